"""Where a distributed checkpoint of PyTorch is, and whether one is."""

from __future__ import annotations

from anyckpt.errors import FormatError
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.storage.location import Location

_METADATA = ".metadata"
_OTHERS = ("metadata.json", "meta.pt")
"""What makes a directory with a ``.metadata`` a Megatron-Core or a Lightning checkpoint."""


def detect(location: Location) -> bool:
    """A directory with ``.metadata`` (or one per rank, or shards of an unfinished save) that is nobody else's.

    Raises:
        FormatError: it is one of the shards, which only their index makes sense of.
    """
    if not location.is_directory and location.suffix == ".distcp":
        raise FormatError(
            "is one shard of a distributed checkpoint",
            path=location.path,
            remedy=f"open the directory that holds it, {location.parent}",
        )
    if not location.is_directory or any(name in location.names for name in _OTHERS):
        return False
    return is_index(location) or tracked(location) is not None


def is_index(location: Location) -> bool:
    """Whether a directory has an index, or shards that name theirs."""
    return _METADATA in location.names or any(
        name.startswith("__") and name.endswith((".distcp", _METADATA)) for name in location.names
    )


def tracked(location: Location) -> Location | None:
    """The iteration that Megatron-FSDP's training root points to, None if it is no such root."""
    if TRACKER not in location.names:
        return None
    try:
        inner = iteration_folder(location)
    except FormatError:
        return None
    others = any(name in inner.names for name in (*_OTHERS, "common.pt"))
    return inner if is_index(inner) and not others else None
