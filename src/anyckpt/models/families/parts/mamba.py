"""Lengths of Mamba-2 mixers, as Megatron-Core has them; no family itself."""

from __future__ import annotations

from collections.abc import Mapping

from anyckpt.config.model import ModelConfig
from anyckpt.models.language.rules import Dimension


def _inner(config: ModelConfig) -> int:
    return (config.mamba_num_heads or 0) * (config.mamba_head_dim or 0)


def _states(config: ModelConfig) -> int:
    return (config.mamba_num_groups or 0) * (config.mamba_state_dim or 0)


DIMENSIONS: Mapping[str, Dimension] = {
    "mamba-heads": lambda config: config.mamba_num_heads or 0,
    "mamba-inner": _inner,
    "mamba-conv": lambda config: _inner(config) + 2 * _states(config),
    "mamba-in": lambda config: 2 * _inner(config) + 2 * _states(config) + (config.mamba_num_heads or 0),
    "kernel": lambda config: 4,
}
MIXER: Mapping[str, tuple[str, ...]] = {
    "A_log": ("mamba-heads",),
    "D": ("mamba-heads",),
    "dt_bias": ("mamba-heads",),
    "in_proj.weight": ("mamba-in", "hidden"),
    "conv1d.weight": ("mamba-conv", "one", "kernel"),
    "conv1d.bias": ("mamba-conv",),
    "norm.weight": ("mamba-inner",),
    "out_proj.weight": ("hidden", "mamba-inner"),
}
"""A mixer's tensors, which have the same names in transformers and in Megatron-Core."""
