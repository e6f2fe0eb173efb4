"""NeMo 1 ``.nemo`` archives: a configuration, weights and artifacts in one tar file, read in place."""

from __future__ import annotations

from anyckpt.formats.format import Format, deferred
from anyckpt.formats.nemo.container import detect
from anyckpt.formats.nemo.naming import dialect

__all__ = ["FORMAT"]

FORMAT = Format(
    name="nemo",
    title="NeMo archive (.nemo)",
    detect=detect,
    read=deferred("anyckpt.formats.nemo.read", "read"),
    plan=deferred("anyckpt.formats.nemo.write", "plan"),
    dialect=dialect,
    config_kind="nemo1",
    unknown_names=True,
    sharded=True,
    packs=True,
    adapters="nemo1",
    suffixes=(".nemo",),
    in_fp32=("preprocessor.featurizer.*", "*.position_embedding.pos_enc"),
    library="nemo",
)
