"""PyTorch distributed checkpoints (DCP): a directory of ``.distcp`` files and a ``.metadata``."""

from __future__ import annotations

from anyckpt.checkpoint import OptimizerForm
from anyckpt.formats.dcp.location import detect
from anyckpt.formats.format import Format, deferred

__all__ = ["FORMAT"]

FORMAT = Format(
    name="dcp",
    title="PyTorch distributed checkpoint",
    detect=detect,
    read=deferred("anyckpt.formats.dcp.read", "read"),
    plan=deferred("anyckpt.formats.dcp.write", "plan"),
    optimizer=OptimizerForm("named", deferred("anyckpt.optimizer.write_named", "write_named")),
)
