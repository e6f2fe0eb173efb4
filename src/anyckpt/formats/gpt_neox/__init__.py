"""Checkpoints of EleutherAI's GPT-NeoX: DeepSpeed's pipeline, a file for each layer and tensor-parallel rank."""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.gpt_neox.location import detect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="gpt-neox",
    title="GPT-NeoX checkpoint (layer files)",
    detect=detect,
    read=deferred("anyckpt.formats.gpt_neox.read", "read"),
)
