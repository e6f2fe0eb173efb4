"""What unpacking, packing and editing know of a ``.nemo``."""

from __future__ import annotations

from typing import Any

from anyckpt.formats.nemo.config import ARTIFACT_SCHEME, missing_artifacts, texts
from anyckpt.formats.nemo.container import CONFIG, FLAT_WEIGHTS, SHARDED_WEIGHTS
from anyckpt.formats.nemo.tokenizer import has_prefix
from anyckpt.formats.shared.archive import ArchiveKind
from anyckpt.plain_yaml import dump_yaml, load_yaml_mapping


def _is_weight(name: str) -> bool:
    return name.rpartition("/")[2] == FLAT_WEIGHTS or name.startswith(f"{SHARDED_WEIGHTS}/")


def _references(config: dict[str, Any]) -> dict[str, str]:
    return {".".join(map(str, keys)): text.removeprefix(ARTIFACT_SCHEME) for keys, text in texts(config)}


ARCHIVES = ArchiveKind(
    format="nemo",
    suffix=".nemo",
    config=CONFIG,
    weights=f"{FLAT_WEIGHTS} or {SHARDED_WEIGHTS}/",
    read=load_yaml_mapping,
    dump=dump_yaml,
    is_weight=_is_weight,
    references=_references,
    missing=missing_artifacts,
    plain_name=lambda name: name[33:] if has_prefix(name) else name,
)
