"""The marker that NeMo puts beside a checkpoint while it saves or deletes it: an empty file ``<name>-unfinished``.

``NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path`` (NeMo 1.21 to 2.5): the name is the checkpoint's
without ``.nemo`` or ``.ckpt``, without ``-EMA``, and outside the folder of a rank.
"""

from __future__ import annotations

import re

from anyckpt.engine.names import UNFINISHED_NAME
from anyckpt.errors import UnfinishedError
from anyckpt.storage.location import Location
from anyckpt.storage.place import LOCAL, Place

_SUFFIX = re.compile(r"\.(nemo|ckpt)$")
_RANK = re.compile(r"(mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)(_fsdp_shard_\d+)?|fsdp_shard_\d+", re.ASCII)
_UNFINISHED = "-unfinished"
_AVERAGED = re.compile(r"-EMA(?=\.ckpt$|$)")


def marker_path(path: str, place: Place = LOCAL) -> str | None:
    """Where the marker of the checkpoint at ``path`` would be; None if nothing can lie beside it."""
    folder, name = place.split(path)
    if folder is None:
        return None
    above, holder = place.split(folder)
    if above is not None and _RANK.fullmatch(holder):
        folder = above
    return place.join(folder, _SUFFIX.sub("", name).removesuffix("-EMA") + _UNFINISHED)


def marker_of(place: Place, path: str) -> str | None:
    """The marker of the checkpoint at ``path``, if it is there."""
    marker = marker_path(path, place)
    return marker if marker is not None and place.exists(marker) else None


def averaged_from(name: str) -> str | None:
    """The checkpoint beside which NeMo's EMA callback puts a second one of this name; None if it puts none so."""
    return _AVERAGED.sub("", name) if _AVERAGED.search(name) else None


def is_marker(name: str) -> bool:
    """Whether something is called as the markers are."""
    return name.endswith(_UNFINISHED)


def check_finished(location: Location) -> None:
    """Raise UnfinishedError if the checkpoint at ``location`` is marked as unfinished, by NeMo or by the engine."""
    if UNFINISHED_NAME in location.names:
        raise UnfinishedError(
            "is unfinished: anyckpt is writing it, or was interrupted",
            path=location.path,
            found=UNFINISHED_NAME,
            remedy="wait for whoever writes it, or run the same command with --resume; anyckpt clean removes it",
        )
    marker = marker_of(location.place, location.path)
    if marker is not None:
        raise UnfinishedError(
            "is marked as unfinished: saving or deleting it was interrupted",
            path=location.path,
            found=marker,
            remedy="use the checkpoint before it, or force it to be opened as it is",
        )
