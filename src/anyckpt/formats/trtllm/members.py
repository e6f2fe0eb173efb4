"""What unpacking, packing and editing know of a ``.qnemo``."""

from __future__ import annotations

import json
from typing import Any

from anyckpt.formats.shared.archive import ArchiveKind
from anyckpt.formats.shared.hub_folder import json_object
from anyckpt.formats.trtllm.container import CONFIG, RANK, SUFFIX, rank_file


def _dump(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=4)


ARCHIVES = ArchiveKind(
    format="trtllm",
    suffix=SUFFIX,
    config=CONFIG,
    weights=rank_file(0),
    read=json_object,
    dump=_dump,
    is_weight=lambda name: RANK.fullmatch(name) is not None,
)
