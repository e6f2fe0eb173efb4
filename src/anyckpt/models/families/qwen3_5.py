"""Qwen3.5 and 3.6, text: Qwen3-Next with a dense MLP, whose nets have an input projection for each kind of rows.

Checked by equal outputs in transformers 5.24 on the way through Megatron's names, which are Megatron-Bridge 0.6.2's,
and in Megatron-Core 0.16's own net.
"""

from __future__ import annotations

from anyckpt.config.model import ModelConfig
from anyckpt.models.families.parts import decoder, delta
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.language.delta_operations import Joined

_MLP = tuple(rule for rule in decoder.RULES if rule.hub.startswith(f"{sparse.HUB}.mlp.") and ".bias" not in rule.hub)


def _rows(config: ModelConfig) -> tuple[int, ...]:
    keys, values, heads = delta.key_rows(config), delta.value_rows(config), delta.value_heads(config)
    return 2 * keys + values, values, heads, heads


NETS = delta.nets(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), Joined(_rows))

FAMILY = delta.family(
    "qwen3.5",
    "Qwen3.5, Qwen3.6 (text)",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    nets=NETS,
    mlp=_MLP,
    traits={"num_moe_experts": None},
)
