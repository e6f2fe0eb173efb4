"""Megatron-Core distributed checkpoints, backend ``zarr``: a directory per tensor, a file per chunk.

The default of Megatron-Core before 0.7 and of NeMo 1 until 2024; Megatron-Core wrote it until 0.15.  Facts:
``dist_checkpointing/strategies/{zarr,tensorstore}.py`` of 0.2 to 0.15, and the specification of zarr's format 2.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.megatron_core import OPTIMIZER
from anyckpt.formats.megatron_core_zarr.location import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="megatron-core-zarr",
    title="Megatron-Core distributed checkpoint (zarr)",
    detect=detect,
    read=deferred("anyckpt.formats.megatron_core_zarr.reader", "read"),
    plan=deferred("anyckpt.formats.megatron_core_zarr.writer", "plan"),
    dialect=lambda options: "megatron-core",
    config_kind="megatron-args",
    leaves_out_arguments=True,
    optimizer=replace(
        OPTIMIZER,
        name="sharded-model-space",
        write=deferred("anyckpt.optimizer.write_model_space", "write_sharded_model_space"),
    ),
)
