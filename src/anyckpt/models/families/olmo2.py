"""OLMo 2: norms after attention and MLP alone, and of the queries and the keys of all heads together.

Checked against transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge has such layers, so that the family goes
to containers alone.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder, post_norm
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

RULES = (*post_norm.RULES, *decoder.WIDE_QUERY_KEY_NORMS)
TRAITS = {**decoder.TRAITS, "add_bias_linear": False, "qk_layernorm": True}

FAMILY = Family(
    name="olmo2",
    title="OLMo 2",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(model_types=("olmo2",), architectures=("Olmo2ForCausalLM",), fields=LLAMA_FIELDS),
)
