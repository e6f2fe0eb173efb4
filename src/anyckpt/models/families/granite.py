"""Granite 3, dense: Llama's map, and multipliers of the embedding, the residual stream, scores and logits.

Checked against transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge has these multipliers, so that the family
goes to containers alone; they stay in its ``config.json`` as they are.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import BIAS_OF_ALL, LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

MULTIPLIERS = frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"})

FAMILY = Family(
    name="granite",
    title="Granite",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits=decoder.TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    like="llama",
    hugging_face=HuggingFace(
        model_types=("granite",),
        architectures=("GraniteForCausalLM",),
        registered=DECODER,
        fields=(*LLAMA_FIELDS, BIAS_OF_ALL),
        carried=MULTIPLIERS,
    ),
)
