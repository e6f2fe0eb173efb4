"""Where a checkpoint of the zarr backend is, and whether one is."""

from __future__ import annotations

import json

from anyckpt.errors import FormatError
from anyckpt.formats.megatron_core.location import COMMIT
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.storage.folder import Folder
from anyckpt.storage.location import Location

_COMMIT_LIMIT = 1 << 20


def is_zarr(folder: Folder) -> bool:
    """Whether ``metadata.json`` names the zarr backend."""
    try:
        values = json.loads(folder.open(COMMIT).read_all(_COMMIT_LIMIT))
    except (FormatError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("sharded_backend") == "zarr"


def detect(location: Location) -> bool:
    """A checkpoint, or a training root whose newest iteration is one."""
    return location.is_directory and checkpoint_folder(location) is not None


def checkpoint_folder(location: Location) -> Location | None:
    """The checkpoint, or the newest of a training root; None if it is neither."""
    if COMMIT in location.names:
        return location if is_zarr(location.folder()) else None
    if TRACKER in location.names:
        try:
            inner = iteration_folder(location)
        except FormatError:
            return None
        return inner if COMMIT in inner.names and is_zarr(inner.folder()) else None
    return None
