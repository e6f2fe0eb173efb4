"""Filling blocks with what their pieces are of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from anyckpt.engine.blocks import Block
from anyckpt.engine.checksum import chunk_digest, crc32
from anyckpt.engine.files import Bytes
from anyckpt.engine.plan import Computed, Literal, OutputFile, Part, Plan, SourceData, TensorData
from anyckpt.engine.records import BlockRecord
from anyckpt.engine.together import read_together
from anyckpt.errors import AnyckptError, OutputError
from anyckpt.storage import requests
from anyckpt.storage.requests import HELD_BYTES, holding
from anyckpt.tensor import Stored

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted


class Filling:
    """A block while it is filled, piece by piece."""

    def __init__(self, block: Block, file: OutputFile, memory: Bytes) -> None:
        self.block = block
        self.file = file
        self.memory = memory
        self.record = BlockRecord()
        self._crcs: dict[int, int] = {}
        self._position = 0

    def part(self, number: int) -> Part:
        return self.file.parts[self.block.pieces[number].part]

    def out(self, number: int) -> Bytes:
        """Where the next piece goes."""
        piece = self.block.pieces[number]
        return self.memory[self._position : self._position + piece.stop - piece.start]

    def finish_piece(self, number: int, *, filled: bool, wanted: set[int]) -> None:
        """Fill a piece unless it is, and note its checksums; pieces come in order."""
        piece = self.block.pieces[number]
        index, start, length = piece.part, piece.start, piece.stop - piece.start
        out = self.memory[self._position : self._position + length]
        if not filled:
            self._fill(self.file.parts[index], start, out)
        self._position += length
        if index in wanted:
            self._crcs[index] = crc32(out)
            self.record.crcs.append((index, start, self._crcs[index], length))
        self.record.digests.append((index, start, chunk_digest(out)))

    def _fill(self, part: Part, start: int, out: Bytes) -> None:
        """Put a part's bytes from ``start`` on there."""
        if isinstance(part, TensorData):
            dtype = part.tensor.dtype
            try:
                part.tensor.fill(start // dtype.itemsize, out.view(dtype.raw))
            except AnyckptError as error:
                error.tensor = error.tensor or part.name
                raise
        elif isinstance(part, Literal):
            out[:] = memoryview(part.data)[start : start + len(out)]
        elif isinstance(part, SourceData):
            with _held([(part.source, start, len(out))], len(out)):
                part.source.read_into(start, out)
        else:
            out[:] = memoryview(built(self.file, part, [self._crcs.get(i, 0) for i in part.parts]))

    def needed(self) -> list[Wanted]:
        """What the whole block needs of far sources."""
        found: list[Wanted] = []
        for number, piece in enumerate(self.block.pieces):
            part = self.part(number)
            if isinstance(part, SourceData):
                found.append((part.source, piece.start, piece.stop - piece.start))
            elif isinstance(part, TensorData) and part.tensor.is_far:
                itemsize = part.tensor.dtype.itemsize
                found += part.tensor.needed(piece.start // itemsize, (piece.stop - piece.start) // itemsize)
        return found


def held(filling: Sequence[Filling]) -> AbstractContextManager[None]:
    """What blocks need of far sources, asked for at once, where it is little enough to be held."""
    wanted = [one for filled in filling for one in filled.needed()]
    return _held(wanted, sum(filled.block.nbytes for filled in filling))


def _held(wanted: Sequence[Wanted], nbytes: int) -> AbstractContextManager[None]:
    """Hold what ``nbytes`` are made of, unless that is too much, or a single request brings it to where it belongs."""
    if sum(length for _, _, length in wanted) > HELD_BYTES:
        return nullcontext()
    ranges = [(start, length) for source, first, count in wanted for _, start, length in source.wanted(first, count)]
    straight = len(ranges) == 1 and ranges[0][1] == nbytes
    return nullcontext() if straight else holding(wanted)


def is_far(plan: Plan) -> bool:
    """Whether a plan reads what is waited for."""
    return any(_is_far(part) for file in plan.files for part in file.parts)


def _is_far(part: Part) -> bool:
    if isinstance(part, SourceData):
        return requests.is_far(part.source)
    return isinstance(part, TensorData) and part.tensor.is_far


def fill_together(filling: Sequence[Filling], number: int) -> None:
    """Fill a piece of every block, columns of the same rows."""
    parts = [one.part(number) for one in filling]
    tensors = [part.tensor for part in parts if isinstance(part, TensorData) and isinstance(part.tensor, Stored)]
    start = filling[0].block.pieces[number].start // tensors[0].dtype.itemsize
    first = parts[0]
    assert isinstance(first, TensorData)
    try:
        read_together(tensors, start, [one.out(number).view(tensors[0].dtype.raw) for one in filling])
    except AnyckptError as error:
        error.tensor = error.tensor or first.name
        raise


def built(file: OutputFile, part: Computed, crcs: Sequence[int]) -> bytes:
    """A computed part's bytes.

    Raises:
        OutputError: they are not as many as planned.
    """
    data = part.build(crcs)
    if len(data) != part.nbytes:
        raise OutputError(
            "a computed part has another length than planned",
            path=file.path,
            expected=part.nbytes,
            found=len(data),
            remedy="report this as a bug in the format's plan",
        )
    return data
