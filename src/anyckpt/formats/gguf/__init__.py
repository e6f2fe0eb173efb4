"""llama.cpp's GGUF: metadata, tokenizer and tensors in one file, most of them in blocks of codes."""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.gguf.parts import detect
from anyckpt.formats.gguf.types import WRITTEN

__all__ = ["FORMAT"]

FORMAT = Format(
    name="gguf",
    title="GGUF file (llama.cpp)",
    detect=detect,
    read=deferred("anyckpt.formats.gguf.read", "read"),
    plan=deferred("anyckpt.formats.gguf.write", "plan"),
    dialect=lambda options: "hf",
    config_kind="hf",
    suffixes=(".gguf",),
    tensor_types=WRITTEN,
)
