"""The marker that NeMo puts beside a checkpoint while it saves or deletes it: an empty file ``<name>-unfinished``.

``NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path`` (NeMo 1.21 to 2.5): the name is the checkpoint's
without ``.nemo`` or ``.ckpt``, without ``-EMA``, and outside the folder of a rank.
"""

from __future__ import annotations

import os
import re

from anyckpt.errors import FormatError

_SUFFIX = re.compile(r"\.(nemo|ckpt)$")
_RANK = re.compile(r"(mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)(_fsdp_shard_\d+)?|fsdp_shard_\d+", re.ASCII)
_UNFINISHED = "-unfinished"


def marker_path(path: str) -> str:
    """Where the marker of the checkpoint at ``path`` would be."""
    folder, name = os.path.split(os.path.normpath(path))
    if _RANK.fullmatch(os.path.basename(folder)):
        folder = os.path.dirname(folder)
    return os.path.join(folder, _SUFFIX.sub("", name).removesuffix("-EMA") + _UNFINISHED)


def check_finished(path: str) -> None:
    """Raise FormatError if NeMo marked the checkpoint at ``path`` as unfinished."""
    marker = marker_path(path)
    if os.path.lexists(marker):
        raise FormatError(
            "is marked as unfinished: saving or deleting it was interrupted",
            path=path,
            found=marker,
            remedy="use the checkpoint before it, or force it to be opened as it is",
        )
