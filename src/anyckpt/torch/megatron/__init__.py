"""Megatron-Core's sharded states: ours without it, theirs as they are, strategies for its ``dist_checkpointing``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand

if TYPE_CHECKING:
    from anyckpt.torch.megatron.entities import (
        LocalNonpersistentObject,
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )
    from anyckpt.torch.megatron.strategies import LoadStrategy, SaveStrategy

__all__ = [
    "LoadStrategy",
    "LocalNonpersistentObject",
    "SaveStrategy",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
]

_WHERE = {
    **dict.fromkeys(
        ("LocalNonpersistentObject", "ShardedObject", "ShardedTensor", "ShardedTensorFactory"),
        "torch.megatron.entities",
    ),
    **dict.fromkeys(("LoadStrategy", "SaveStrategy"), "torch.megatron.strategies"),
}

__getattr__, __dir__ = on_demand(__name__, _WHERE)
