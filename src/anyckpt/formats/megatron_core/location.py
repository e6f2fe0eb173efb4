"""Finding a Megatron-Core checkpoint: the directory itself, or the iteration that a training root points to."""

from __future__ import annotations

import json
from typing import Any

from anyckpt.errors import FormatError, UnfinishedError
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.storage.folder import Folder
from anyckpt.storage.location import Location

COMMIT = "metadata.json"
COMMON = "common.pt"
_COMMIT_LIMIT = 1 << 20


def is_checkpoint(location: Location) -> bool:
    """Whether a directory is a Megatron-Core checkpoint, whole or not.

    ``metadata.json`` marks a finished one; shards beside a ``common.pt`` are one that was not finished (an
    asynchronous save writes ``common.pt`` first).  ``.metadata`` alone is somebody else's.
    """
    names = location.names
    shards = any(name.endswith(".distcp") for name in names)
    if COMMIT in names:
        return shards or ".metadata" in names or "sharded_backend" in _commit(location.folder(), quiet=True)
    return COMMON in names and (shards or ".metadata" in names)


def detect(location: Location) -> bool:
    """As the registry asks: a checkpoint, or a training root whose newest iteration is one."""
    if not location.is_directory:
        return False
    if is_checkpoint(location):
        return True
    if TRACKER not in location.names:
        return False
    try:
        return is_checkpoint(iteration_folder(location))
    except FormatError:
        # A tracker that leads nowhere is still Megatron's: reading it says what is wrong.
        return not any(_has_ranks(location, name) for name in location.names)


def _has_ranks(location: Location, name: str) -> bool:
    """Whether an iteration is of the older layout of one directory per rank."""
    return any(inner.startswith("mp_rank_") for inner in location.names_in(name))


def check_commit(folder: Folder) -> list[str]:
    """Check ``metadata.json``, the last file to be written; gives warnings.

    Raises:
        FormatError: it is not valid, or names a backend other than torch_dist.
    """
    if COMMIT not in folder.names():
        return ["has no metadata.json: the save stopped before its very end; Megatron-Core refuses to load it"]
    backend = _commit(folder).get("sharded_backend")
    if backend != "torch_dist":
        raise FormatError(
            "names an unknown backend",
            path=folder.open(COMMIT).name,
            expected="torch_dist",
            found=repr(backend)[:100],
        )
    return []


def _commit(folder: Folder, *, quiet: bool = False) -> dict[str, Any]:
    """The contents of ``metadata.json``; empty if ``quiet`` and it is not valid."""
    try:
        source = folder.open(COMMIT)
        if source.size == 0:
            raise UnfinishedError(
                "is empty", path=source.name, remedy="the save was interrupted; use the checkpoint before it"
            )
        value = json.loads(source.read_all(_COMMIT_LIMIT))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where an object is expected")
    except FormatError:
        if quiet:
            return {}
        raise
    except (ValueError, RecursionError) as problem:
        if quiet:
            return {}
        raise FormatError(
            f"is not valid JSON: {problem}",
            path=source.name,
            expected='{"sharded_backend": "torch_dist", ...}',
            remedy="the save was interrupted; use the checkpoint before it",
        ) from None
    return value
