"""GLM-4 in transformers' own code: ChatGLM's layers with query, key and value apart.

Whatever ChatGLM Megatron or NeMo has, transformers of today loads as ``--family glm``.  Checked against transformers
5.23; equal logits of both codes are what ChatGLM's map was checked by.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import chatglm
from anyckpt.models.families.parts import decoder, nemo2
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_BASE = nemo2.general()
_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"


def _rule(rule: Rule) -> Rule:
    """Llama's rule, with gate and up projection fused."""
    return decoder.FUSED_GATE_UP if rule.hub == decoder.FUSED_GATE_UP.hub else rule


FAMILY = Family(
    name="glm",
    title="GLM-4",
    rules=tuple(_rule(rule) for rule in decoder.RULES if rule.hub == _BIAS or not rule.hub.endswith(".bias")),
    ignorable=decoder.IGNORABLE,
    traits={**chatglm.FAMILY.traits, "add_bias_linear": False},
    hugging_face=HuggingFace(
        model_types=("glm",),
        architectures=("GlmForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            Field("add_qkv_bias", "attention_bias", "flag", True),
        ),
        rotary_percent=0.5,
        attention_bias=None,
    ),
    nemo2=replace(_BASE, configs=(*_BASE.configs, *chatglm.NEMO2_CONFIGS)),
)
