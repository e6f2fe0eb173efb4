"""Drop-ins for Lightning 2.x (``pip install anyckpt[lightning]``); the only package here that imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand
from anyckpt.torch.missing import told_of

if TYPE_CHECKING:
    from anyckpt.torch.lightning.averaging import EMA
    from anyckpt.torch.lightning.checkpoint_io import CheckpointIO
    from anyckpt.torch.lightning.model_checkpoint import ModelCheckpoint
    from anyckpt.torch.lightning.strategies import ModelParallelStrategy

__all__ = ["EMA", "CheckpointIO", "ModelCheckpoint", "ModelParallelStrategy"]

_WHERE: dict[str, str] = {
    "CheckpointIO": "torch.lightning.checkpoint_io",
    "EMA": "torch.lightning.averaging",
    "ModelCheckpoint": "torch.lightning.model_checkpoint",
    "ModelParallelStrategy": "torch.lightning.strategies",
}

_find, __dir__ = on_demand(__name__, _WHERE)
__getattr__ = told_of(_find, __name__, "lightning")
