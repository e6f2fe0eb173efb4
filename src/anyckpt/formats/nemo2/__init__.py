"""NeMo 2 directories: ``context`` with the model's configuration and tokenizer, ``weights`` by Megatron-Core."""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.megatron_core import OPTIMIZER
from anyckpt.formats.nemo2.location import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="nemo2",
    title="NeMo 2 checkpoint directory",
    detect=detect,
    read=deferred("anyckpt.formats.nemo2.read", "read"),
    plan=deferred("anyckpt.formats.nemo2.write", "plan"),
    dialect=lambda options: "nemo2",
    config_kind="nemo2",
    adapters="megatron",
    backends=("torch_dist", "zarr"),
    optimizer=OPTIMIZER,
    library="nemo",
)
