"""Megatron-Core distributed checkpoints, backend ``torch_dist``: what Megatron-LM, NeMo and Megatron-Bridge save."""

from __future__ import annotations

from anyckpt.checkpoint import OptimizerForm
from anyckpt.formats.format import Format, deferred
from anyckpt.formats.megatron_core.location import detect

__all__ = ["FORMAT", "OPTIMIZER"]

OPTIMIZER = OptimizerForm("model-space", deferred("anyckpt.optimizer.write_model_space", "write_model_space"), True)

FORMAT = Format(
    name="megatron-core",
    title="Megatron-Core distributed checkpoint (torch_dist)",
    detect=detect,
    read=deferred("anyckpt.formats.megatron_core.reader", "read"),
    plan=deferred("anyckpt.formats.megatron_core.writer", "plan"),
    dialect=lambda options: "megatron-core",
    config_kind="megatron-args",
    leaves_out_arguments=True,
    by_release=True,
    backends=("torch_dist", "fsdp_dtensor"),
    adapters="megatron",
    optimizer=OPTIMIZER,
)
