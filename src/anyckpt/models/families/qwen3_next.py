"""Qwen3-Next: gated delta nets between layers of gated attention, experts with a gated one for every token.

Query, key, value and z of a net are interleaved by its key heads, and so are beta and alpha.  Checked by equal outputs
in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's, and in Megatron-Core 0.16's
own net.
"""

from __future__ import annotations

from anyckpt.config.codecs import negated
from anyckpt.config.model import ModelConfig
from anyckpt.models.families.parts import delta
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.language.delta_operations import JoinedByHead


def _kinds(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Rows of ``in_proj_qkvz`` and of ``in_proj_ba``, by kind."""
    keys, values, heads = delta.key_rows(config), delta.value_rows(config), delta.value_heads(config)
    return (keys, keys, values, values), (heads, heads)


FAMILY = delta.family(
    "qwen3-next",
    "Qwen3-Next",
    "qwen3_next",
    "Qwen3NextForCausalLM",
    nets=delta.nets(
        ("in_proj_qkvz", "in_proj_ba"), JoinedByHead(_kinds, lambda config: config.linear_num_key_heads or 1)
    ),
    dense=sparse.DENSE,
    mlp=(*sparse.experts(), *sparse.GATED_SHARED),
    traits={"moe_router_score_function": "softmax", "moe_shared_expert_gate": True},
    codecs=(negated("moe_router_pre_softmax", "norm_topk_prob", True), sparse.SteppedLayers()),
)
