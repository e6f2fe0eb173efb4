"""Hunyuan, dense: Llama's map, and queries and keys that are normalised after they are rotated.

Checked against transformers 5.24.  Megatron-Core normalises before it rotates, which gives other scores, so that the
family goes to containers alone.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family

_NORMS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}

FAMILY = Family(
    name="hunyuan-dense",
    title="Hunyuan (dense)",
    rules=(
        *decoder.RULES,
        *(
            replace(rule, source=tuple(name.replace(theirs, own) for name in rule.source))
            for rule in decoder.QUERY_KEY_NORMS
            for theirs, own in _NORMS.items()
            if theirs in "".join(rule.source)
        ),
    ),
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False, "qk_layernorm": True},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(
        model_types=("hunyuan_v1_dense",),
        architectures=("HunYuanDenseV1ForCausalLM",),
        fields=LLAMA_FIELDS,
        expected={"use_qk_norm": True, "mlp_bias": False, "use_cla": False},
    ),
)
