"""Qwen3-Next: gated delta nets between layers of gated attention, experts with a gated one for every token.

Query, key, value and z of a net are interleaved by its key heads, and so are beta and alpha.  Checked by equal outputs
in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's, and in Megatron-Core 0.16's
own net.
"""

from __future__ import annotations

from anyckpt.config.codecs import negated
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import delta
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.delta_operations import JoinedByHead
from anyckpt.models.language.family import Family


def _kinds(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Rows of ``in_proj_qkvz`` and of ``in_proj_ba``, by kind."""
    keys, values, heads = delta.key_rows(config), delta.value_rows(config), delta.value_heads(config)
    return (keys, keys, values, values), (heads, heads)


_EXPERTS = (*sparse.experts(), *sparse.GATED_SHARED)
FAMILY = Family(
    name="qwen3-next",
    title="Qwen3-Next",
    rules=(
        *sparse.LEADING,
        *delta.ATTENTION,
        *delta.nets(
            ("in_proj_qkvz", "in_proj_ba"), JoinedByHead(_kinds, lambda config: config.linear_num_key_heads or 1)
        ),
        *sparse.DENSE,
        *_EXPERTS,
        *delta.further(_EXPERTS),
        *sparse.TRAILING,
    ),
    traits={**delta.TRAITS, "moe_router_score_function": "softmax", "moe_shared_expert_gate": True},
    features=delta.FEATURES | {"num_moe_experts", "num_experts"},
    recognise=lambda config: config.linear_attention_freq is not None and config.num_moe_experts is not None,
    nemo1=False,
    refine=delta.refine,
    dimensions=delta.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("qwen3_next",),
        architectures=("Qwen3NextForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            *sparse.fields("num_experts"),
            Field("moe_ffn_hidden_size", "moe_intermediate_size"),
            Field("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
            *delta.FIELDS,
        ),
        rotary_percent=0.25,
        codecs=(
            negated("moe_router_pre_softmax", "norm_topk_prob", True),
            sparse.SteppedLayers(),
            delta.NetLayers(),
        ),
        keys=delta.KEYS,
        variants=(*sparse.STACKED, *delta.further_variants(sparse.STACKED)),
    ),
)
