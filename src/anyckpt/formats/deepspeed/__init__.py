"""Checkpoints of DeepSpeed: ZeRO stages 1 to 3, universal ones, and those of engines without ZeRO."""

from anyckpt.formats.deepspeed.location import detect
from anyckpt.formats.format import Format, deferred

__all__ = ["FORMAT"]

FORMAT = Format(
    name="deepspeed",
    title="DeepSpeed checkpoint",
    detect=detect,
    read=deferred("anyckpt.formats.deepspeed.read", "read"),
)
