"""Seed-OSS: Llama's map and biases of query, key and value, as Qwen 2, with heads of a width of their own.

Checked against transformers 5.24; NVIDIA's frameworks have no classes for it, but build it of these settings.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER

_UNBIASED = {"attention_out_bias": False, "mlp_bias": False}

FAMILY = Family(
    name="seed-oss",
    title="Seed-OSS",
    rules=decoder.RULES,
    ignorable=decoder.IGNORABLE,
    traits={**{k: v for k, v in decoder.TRAITS.items() if k != "add_qkv_bias"}, "add_bias_linear": False},
    recognise=lambda config: False,  # nothing but its name tells it from Qwen 2
    nemo1=False,
    like="qwen2",
    hugging_face=HuggingFace(
        model_types=("seed_oss",),
        architectures=("SeedOssForCausalLM",),
        registered=DECODER,
        fields=(
            *LLAMA_FIELDS,
            Field("add_qkv_bias", "attention_bias", "flag", True),
            Field("hidden_dropout", "residual_dropout", "number", 0.0),
        ),
        constants=_UNBIASED,
        expected=_UNBIASED,
        attention_bias=None,
    ),
)
