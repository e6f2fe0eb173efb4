"""ERNIE 4.5, dense: Llama's map, but neighbouring channels are rotated together.

Checked against transformers 5.24.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

TRAITS = {**decoder.TRAITS, "rotary_interleaved": True}
THETA = 500_000.0

FAMILY = Family(
    name="ernie4-5",
    title="ERNIE 4.5",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: config.num_moe_experts is None and config.rotary_percent == 1.0,
    nemo1=False,
    like="llama",
    hugging_face=HuggingFace(
        model_types=("ernie4_5",),
        architectures=("Ernie4_5ForCausalLM",),
        registered=DECODER,
        fields=(*LLAMA_FIELDS, Field("add_bias_linear", "use_bias", "flag", False)),
        rotary_base=THETA,
        attention_bias=None,
    ),
)
