"""Where a NeMo 2 checkpoint is, and whether one is."""

from __future__ import annotations

from anyckpt.storage.location import Location

CONTEXT = "context"
WEIGHTS = "weights"
IO_JSON = "io.json"
MODEL_YAML = "model.yaml"
_INDEX_NAMES = ("metadata.json", ".metadata", "common.pt")


def detect(location: Location) -> bool:
    """A directory with ``context/io.json`` and weights below or beside it, or ``weights/`` with an index."""
    if not location.is_directory:
        return False
    has_context = CONTEXT in location.names and location.place.exists(location.join(CONTEXT, IO_JSON))
    if WEIGHTS in location.names:
        return has_context or has_index(location, WEIGHTS)
    return has_context


def has_index(location: Location, *folder: str) -> bool:
    """Whether a folder in it has what a distributed checkpoint is found by."""
    return any(location.is_file(*folder, name) for name in _INDEX_NAMES)
