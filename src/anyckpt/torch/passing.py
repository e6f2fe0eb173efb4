"""What several ranks load alike is read by one of them and passed on to the others, from live tensor to live tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.live import LivePiece
from anyckpt.torch.memory import bytes_of

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


def pass_on(share: ReadShare, pieces: Sequence[LivePiece], ranks: Ranks, exchange: str = "broadcast") -> None:
    """Send what was read to the others that load it; all ranks call it.

    In every way a rank holds some 64 MB at once besides its tensors.

    Args:
        share: who read what.
        pieces: this rank's.
        ranks: who they are.
        exchange: ``broadcast``: each box to those that load it, one after another; ``all-gather``: in each round as
            much of what each rank has read as there is room for, from all to all; ``round-robin``: in each round one
            box of each rank, from all to all.

    Raises:
        RankError: a rank did not come.
    """
    tensors = {(piece.name, piece.offset): piece.tensor for piece in pieces}
    boxes = [
        _Passed(reader, others, tensors.get((name, offset)) if ranks.rank in (reader, *others) else None, nbytes)
        for name, offset, nbytes, reader, others in share.passed
    ]
    if exchange == "broadcast":
        for batch in _batches(boxes):
            with_memory = [box for box in batch if box.open(of_reader=box.reader == ranks.rank)]
            ranks.distribute([(box.reader, box.others, box.memory) for box in with_memory])
            for box in with_memory:
                box.close(filled=box.reader != ranks.rank)
        return
    most = max(1, _ROUND_BYTES // (ranks.size + 1))
    for parts in _rounds(boxes, ranks.size, most, alone=exchange == "round-robin"):
        _gather(parts, ranks)


class _Passed:
    """A box that one rank has read and others load, with its bytes in the host's memory while they are passed."""

    def __init__(self, reader: int, others: tuple[int, ...], tensor: torch.Tensor | None, nbytes: int) -> None:
        self.reader = reader
        self.others = others
        self.nbytes = nbytes
        self.memory: torch.Tensor | None = None
        self._tensor = tensor

    def open(self, *, of_reader: bool) -> bool:
        """Have the bytes at hand, if this rank takes part; whether it does."""
        if self._tensor is None:
            return False
        if self.memory is None:
            tensor = self._tensor
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                self.memory = bytes_of(tensor)
            elif of_reader:
                self.memory = bytes_of(tensor.cpu().contiguous())
            else:
                self.memory = torch.empty(self.nbytes, dtype=torch.uint8)
        return True

    def close(self, *, filled: bool) -> None:
        """Let go of the bytes; put them where they belong if they came from another rank."""
        tensor, memory = self._tensor, self.memory
        self.memory = None
        if not filled or tensor is None or memory is None:
            return
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            tensor.copy_(memory.view(tensor.dtype).view(tensor.shape))


_Part = tuple[_Passed, int, int]
"""A box, and the first and the last but one of its bytes that are passed at once."""


def _batches(boxes: Sequence[_Passed]) -> Iterator[list[_Passed]]:
    batch: list[_Passed] = []
    room = _ROUND_BYTES
    for box in boxes:
        batch.append(box)
        room -= box.nbytes
        if room <= 0:
            yield batch
            batch, room = [], _ROUND_BYTES
    yield batch


def _rounds(boxes: Sequence[_Passed], size: int, most: int, *, alone: bool) -> Iterator[list[list[_Part]]]:
    """For each round what each rank gives of what it has read.

    Args:
        boxes: in one order on all ranks.
        size: number of ranks.
        most: bytes that each may give in a round.
        alone: a rank gives parts of one box only.
    """
    waiting: list[list[_Part]] = [[] for _ in range(size)]
    for box in reversed(boxes):
        starts = range(0, box.nbytes, most)
        waiting[box.reader] += [(box, start, min(box.nbytes, start + most)) for start in reversed(starts)]
    while any(waiting):
        given: list[list[_Part]] = []
        for queue in waiting:
            parts: list[_Part] = []
            room = most
            while queue and queue[-1][2] - queue[-1][1] <= room and not (alone and parts):
                parts.append(queue.pop())
                room -= parts[-1][2] - parts[-1][1]
            given.append(parts)
        yield given


def _gather(given: Sequence[Sequence[_Part]], ranks: Ranks) -> None:
    """One round: every rank gets what all give, and keeps what it loads."""
    lengths = [sum(stop - start for _, start, stop in parts) for parts in given]
    data = torch.empty(max(lengths), dtype=torch.uint8)
    at = 0
    for box, start, stop in given[ranks.rank]:
        box.open(of_reader=True)
        assert box.memory is not None
        data[at : at + stop - start] = box.memory[start:stop]
        at += stop - start
        if stop == box.nbytes:
            box.close(filled=False)
    for rank, (parts, arrived) in enumerate(zip(given, ranks.all_gather(data), strict=True)):
        at = 0
        for box, start, stop in parts if rank != ranks.rank else ():
            if ranks.rank in box.others and box.open(of_reader=False):
                assert box.memory is not None
                box.memory[start:stop] = arrived[at : at + stop - start]
                if stop == box.nbytes:
                    box.close(filled=True)
            at += stop - start
