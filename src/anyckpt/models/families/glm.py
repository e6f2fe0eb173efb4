"""GLM-4 in transformers' own code: ChatGLM's layers with query, key and value apart.

Whatever ChatGLM Megatron or NeMo has, transformers of today loads as ``--family glm``.  Checked against transformers
5.23; equal logits of both codes are what ChatGLM's map was checked by.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import chatglm, gpt2, llama, phi3
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_BASE = gpt2.nemo2_base()
_GATE_UP = "decoder.layers.*.mlp.linear_fc1.weight"
_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"


def _rule(rule: Rule) -> Rule:
    """Llama's rule, with Phi-3's fused gate and up projection."""
    return next(other for other in phi3.FAMILY.rules if other.hub == _GATE_UP) if rule.hub == _GATE_UP else rule


FAMILY = Family(
    name="glm",
    title="GLM-4",
    rules=tuple(_rule(rule) for rule in llama.RULES if rule.hub == _BIAS or not rule.hub.endswith(".bias")),
    ignorable=llama.IGNORABLE,
    traits={**chatglm.FAMILY.traits, "add_bias_linear": False},
    hugging_face=HuggingFace(
        model_types=("glm",),
        architectures=("GlmForCausalLM",),
        fields=(
            *COMMON,
            Field("layernorm_epsilon", "rms_norm_eps", "number"),
            Field("add_qkv_bias", "attention_bias", "flag", True),
        ),
        rotary_percent=0.5,
        attention_bias=None,
    ),
    nemo2=replace(_BASE, configs=(*_BASE.configs, *chatglm.NEMO2_CONFIGS)),
)
