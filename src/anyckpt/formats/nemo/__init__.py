"""NeMo 1 ``.nemo`` archives: a configuration, weights and artifacts in one tar file, read in place."""

from __future__ import annotations

from anyckpt.formats.nemo.container import detect
from anyckpt.formats.nemo.read import read
from anyckpt.formats.nemo.write import dialect, plan
from anyckpt.formats.registry import Format

__all__ = ["FORMAT"]

FORMAT = Format(
    name="nemo",
    title="NeMo archive (.nemo)",
    detect=detect,
    read=read,
    plan=plan,
    dialect=dialect,
    config_kind="nemo1",
    single_file=True,
)
