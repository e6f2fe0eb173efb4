"""Checkpoints of (PyTorch) Lightning: a file, or a directory ``*.ckpt`` of ``meta.pt`` and distributed shards."""

from anyckpt.checkpoint import OptimizerForm
from anyckpt.formats.format import Format, deferred
from anyckpt.formats.lightning.location import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="lightning",
    title="Lightning checkpoint",
    detect=detect,
    read=deferred("anyckpt.formats.lightning.ranks", "read"),
    plan=deferred("anyckpt.formats.lightning.write", "plan"),
    sharded=True,
    suffixes=(".ckpt",),
    optimizer=OptimizerForm("numbered", deferred("anyckpt.optimizer.write_numbered", "write_numbered")),
)
