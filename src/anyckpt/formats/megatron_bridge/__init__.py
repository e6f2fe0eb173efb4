"""Megatron-Bridge checkpoints: a Megatron-Core payload with ``run_config.yaml`` and ``train_state.pt`` beside it.

Facts: ``training/checkpointing.py``, ``training/state.py``, ``training/utils/checkpoint_utils.py`` and
``models/gpt_provider.py`` of Megatron-Bridge 0.1 to 0.6, and a ``run_config.yaml`` that a training run of 2025-10
printed.  Megatron-Bridge itself has not been run on what is written here.
"""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.megatron_bridge.location import detect
from anyckpt.formats.megatron_core import OPTIMIZER

__all__ = ["FORMAT"]

FORMAT = Format(
    name="megatron-bridge",
    title="Megatron-Bridge checkpoint",
    detect=detect,
    read=deferred("anyckpt.formats.megatron_bridge.read", "read"),
    plan=deferred("anyckpt.formats.megatron_bridge.write", "plan"),
    dialect=lambda options: "megatron-core",
    config_kind="megatron-args",
    adapters="megatron",
    by_release=True,
    backends=("torch_dist", "fsdp_dtensor"),
    optimizer=OPTIMIZER,
)
