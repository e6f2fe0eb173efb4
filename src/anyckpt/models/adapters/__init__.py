"""Adapters (LoRA, DoRA): their names in PEFT, NeMo and Megatron-Bridge, their forms, and their sum with a model."""

from __future__ import annotations

from anyckpt.models.adapters.adapter import Adapter, LowRank, Target
from anyckpt.models.adapters.by_name import Placed, merged_by_name
from anyckpt.models.adapters.forms import completed, fused, of_one_rank, separated, without_empty
from anyckpt.models.adapters.layers import Layers
from anyckpt.models.adapters.merge import idle, merged
from anyckpt.models.adapters.settings import (
    KINDS,
    check_adapter,
    place_by_name,
    read_adapter,
    settings_of,
    spelling_of,
    with_alpha,
)

__all__ = [
    "KINDS",
    "Adapter",
    "Layers",
    "LowRank",
    "Placed",
    "Target",
    "check_adapter",
    "completed",
    "fused",
    "idle",
    "merged",
    "merged_by_name",
    "of_one_rank",
    "place_by_name",
    "read_adapter",
    "separated",
    "settings_of",
    "spelling_of",
    "with_alpha",
    "without_empty",
]
