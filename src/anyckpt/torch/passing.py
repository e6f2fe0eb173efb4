"""What several ranks load alike is read by one of them and passed on to the others, from live tensor to live tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anyckpt.indexing import Shape
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.live import LivePiece

_ROUND_BYTES = 64 << 20

HeldRow = tuple[str, Shape, Shape, int]
"""Name, first index, lengths and bytes of a box that a rank loads."""


@dataclass(frozen=True)
class ReadShare:
    """Who reads what of what ranks load.

    Attributes:
        own: name and first index of the boxes that this rank reads.
        passed: the boxes that several ranks load, in one order on all: name, first index, bytes, who reads it, who
            gets it.
    """

    own: frozenset[tuple[str, Shape]]
    passed: tuple[tuple[str, Shape, int, int, tuple[int, ...]], ...]


def readers(held: Sequence[Sequence[HeldRow]], ranks: Ranks) -> ReadShare:
    """Divide the reading evenly by bytes: of several ranks that load a box, the one with least to read so far reads it.

    Args:
        held: what each rank loads.
        ranks: who they are.
    """
    wanted: dict[tuple[str, Shape, Shape, int], list[int]] = {}
    for rank, rows in enumerate(held):
        for row in rows:
            wanted.setdefault(row, []).append(rank)
    load = [0] * ranks.size
    own: set[tuple[str, Shape]] = set()
    passed = []
    for (name, offset, _, nbytes), who in sorted(wanted.items(), key=lambda item: (len(item[1]) > 1, -item[0][3])):
        reader = min(who, key=lambda rank: (load[rank], rank))
        load[reader] += nbytes
        if reader == ranks.rank:
            own.add((name, offset))
        if len(who) > 1 and nbytes:
            passed.append((name, offset, nbytes, reader, tuple(rank for rank in who if rank != reader)))
    return ReadShare(frozenset(own), tuple(passed))


def pass_on(share: ReadShare, pieces: Sequence[LivePiece], ranks: Ranks) -> None:
    """Send what was read to the others that load it, in rounds of a few megabytes; all ranks call it.

    Raises:
        RankError: a rank did not come.
    """
    mine = {(piece.name, piece.offset): piece.tensor for piece in pieces}
    batch: list[tuple[int, tuple[int, ...], torch.Tensor | None]] = []
    size = 0
    for name, offset, nbytes, reader, others in share.passed:
        batch.append((reader, others, mine.get((name, offset))))
        size += nbytes
        if size >= _ROUND_BYTES:
            ranks.distribute(batch)
            batch, size = [], 0
    ranks.distribute(batch)
