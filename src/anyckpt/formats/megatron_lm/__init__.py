"""Megatron-LM's own checkpoints, one file per rank: ``mp_rank_00_001/model_optim_rng.pt``."""

from __future__ import annotations

from anyckpt.checkpoint import OptimizerForm
from anyckpt.formats.format import Format, deferred
from anyckpt.formats.megatron_lm.location import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="megatron-lm",
    title="Megatron-LM checkpoint of one file per rank",
    detect=detect,
    read=deferred("anyckpt.formats.megatron_lm.reader", "read"),
    plan=deferred("anyckpt.formats.megatron_lm.writer", "plan"),
    dialect=lambda options: "hub",
    config_kind="megatron-args",
    optimizer=OptimizerForm("by-rank", deferred("anyckpt.optimizer.write", "left_to_plan"), adam_only=True),
)
