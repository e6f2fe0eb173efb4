"""What partition rules need of a model, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.layout.geometry import Delta, Geometry, Latent, Mamba

_SAME = (
    "num_layers",
    "encoder_num_layers",
    "mtp_num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "padded_vocab_size",
)
_FLAGS = ("attention_output_gate", "gated_linear_unit", "share_embeddings_and_output_weights")
_DELTA = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
_MAMBA = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


def geometry_of(config: Mapping[str, Any], *, down_parallel: bool = False) -> Geometry:
    """The geometry of a model; sizes that are not said are None.

    The vocabulary is not trimmed (``vocab_size`` None), so that rows stay as stored.

    Args:
        config: fields of ``ModelConfig``, of which any may be None or missing (``config.of_ranks.sizes``).
        down_parallel: see ``Latent``.
    """
    same: dict[str, Any] = {name: config.get(name) for name in _SAME}
    flags = {name: bool(config.get(name)) for name in _FLAGS}
    mamba: list[Any] = [config.get(name) for name in _MAMBA]
    delta: list[Any] = [config.get(name) for name in _DELTA]
    return Geometry(
        **same,
        **flags,
        num_experts=config.get("num_moe_experts"),
        make_vocab_size_divisible_by=config.get("make_vocab_size_divisible_by") or 128,
        mamba=None if None in mamba or "M" not in (config.get("hybrid_override_pattern") or "M") else Mamba(*mamba),
        delta=None if None in delta else Delta(*delta),
        latent=_latent(config, down_parallel) if config.get("multi_latent_attention") else None,
        blocks=config.get("heterogeneous_blocks"),
    )


def _latent(config: Mapping[str, Any], down_parallel: bool) -> Latent:
    return Latent(config["q_lora_rank"], config["kv_lora_rank"], config["qk_pos_emb_head_dim"], down_parallel)
