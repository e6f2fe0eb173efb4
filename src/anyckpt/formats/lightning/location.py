"""Where a Lightning checkpoint is, and whether one is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyckpt.errors import LastingError
from anyckpt.formats.lightning.keys import META, VERSION
from anyckpt.formats.shared.rank_folders import parse_folder
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

_HEAD = 64 << 10


def detect(location: Location) -> bool:
    """A Lightning checkpoint, or a directory whose rank folders have them.

    One is a directory with ``meta.pt`` and shards, or a torch file whose pickle begins as Lightning's does.
    """
    if location.is_directory:
        if any(names_in(location, folder) for folder in rank_folders(location.names)):
            return True
        return META in location.names and any(name.endswith((".metadata", ".distcp")) for name in location.names)
    try:
        return VERSION.encode() in _pickle_head(location)
    except LastingError:
        return False  # a damaged file is the torch format's to report


def rank_folders(names: Iterable[str]) -> list[str]:
    """Those of the names that are a rank's folder."""
    return [name for name in names if re.match(r"(mp|tp)_rank_\d", name) and parse_folder(name) is not None]


def names_in(root: Location, folder: str) -> list[str]:
    """The checkpoints in a folder."""
    return [name for name in root.names_in(folder) if name.endswith(".ckpt")]


def _pickle_head(location: Location) -> bytes:
    from anyckpt.containers.torch_file.legacy_stream import is_stream
    from anyckpt.containers.torch_file.reader import root_folder
    from anyckpt.storage.zip import read_zip

    source: ByteSource = location.open()
    if location.head.startswith(b"PK\x03\x04"):
        records = read_zip(source)
        source = records[f"{root_folder(records, location.path)}/data.pkl"].source
    elif not is_stream(location.head):
        return b""
    return source.read(0, min(_HEAD, source.size))
