"""Cutting an output file into blocks: the units of work, of the journal, and of memory.

A tensor's bytes are cut at multiples of ``CHUNK_BYTES`` counted from its own first byte, so that its digest does
not depend on where in a file it lies.  A block is a run of neighbouring chunks and small parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anyckpt.engine.checksum import CHUNK_BYTES
from anyckpt.engine.plan import Computed, OutputFile, Part, SourceData, TensorData
from anyckpt.errors import UsageError
from anyckpt.indexing import flat_boxes
from anyckpt.tensor import Stored


class Piece(NamedTuple):
    """Bytes ``[start, stop)`` of the part with index ``part`` in its file."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Block:
    """A run of bytes of one output file.

    Attributes:
        file: index in the plan's ``files``.
        offset: first byte in the file.
        nbytes: how many.
        pieces: what fills it, in order.
        owner: the number of the share whose process alone has bytes of it; None if any process can fill it.
    """

    file: int
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    owner: int | None = None


Owner = Callable[[Part, Piece], int | None]


@dataclass(frozen=True)
class LatePart:
    """A computed part that depends on checksums from more than one block: written after all blocks of its file."""

    part: int
    offset: int


@dataclass(frozen=True)
class Cut:
    """The files of a plan, cut into blocks.

    Attributes:
        blocks: of each file, in its order.
        late: of each file, the parts that must wait for all of its blocks.
    """

    blocks: tuple[tuple[Block, ...], ...]
    late: tuple[tuple[LatePart, ...], ...]


def cut_all(files: Sequence[OutputFile], *, owned: bool = False) -> Cut:
    """Every file of a plan, in the same way in every process.

    Args:
        files: of the plan.
        owned: some of their bytes are those of one process (``OwnedSource``); a block has one owner at most.

    Raises:
        UsageError: a chunk of a tensor has several owners.
    """
    found = [cut(number, file, owner_of if owned else None) for number, file in enumerate(files)]
    return Cut(tuple(tuple(blocks) for blocks, _ in found), tuple(tuple(late) for _, late in found))


def owner_of(part: Part, piece: Piece) -> int | None:
    """The share whose process alone has bytes of a piece.

    Raises:
        UsageError: there are several.
    """
    if isinstance(part, SourceData):
        return part.source.owner()
    if not isinstance(part, TensorData):
        return None
    tensor, itemsize = part.tensor, part.tensor.dtype.itemsize
    if isinstance(tensor, Stored):
        return tensor.source.owner()
    boxes = flat_boxes(tensor.shape, piece.start // itemsize, (piece.stop - piece.start) // itemsize)
    found = {stored.source.owner() for start, shape in boxes for stored in tensor.box(start, shape).pieces()} - {None}
    if len(found) > 1:
        raise UsageError(
            f"bytes {piece.start:,} to {piece.stop:,} of it are held by several processes",
            tensor=part.name,
            expected="one owner for each 4 MiB of an output tensor",
            found=f"shares {sorted(map(str, found))}",
            remedy="write the parts that processes hold as tensors or files of their own",
        )
    return next(iter(found), None)


def cut(number: int, file: OutputFile, owner: Owner | None = None) -> tuple[list[Block], list[LatePart]]:
    """The blocks of one file, in file order, and the parts that must wait for all of them."""
    builder = _Builder(number, file.parts, owner)
    for index, part in enumerate(file.parts):
        if isinstance(part, Computed):
            builder.add_computed(index, part)
        else:
            for start in range(0, part.nbytes, CHUNK_BYTES):
                builder.add(Piece(index, start, min(start + CHUNK_BYTES, part.nbytes)))
    builder.close()
    return builder.blocks, builder.late


class _Builder:
    def __init__(self, number: int, parts: Sequence[Part], owner: Owner | None) -> None:
        self._number = number
        self._parts = parts
        self._owner_of = owner
        self._owner: int | None = None
        self._position = 0
        self._pieces: list[Piece] = []
        self._nbytes = 0
        self._whole: set[int] = set()  # parts that lie in the open block from their first byte to their last
        self.blocks: list[Block] = []
        self.late: list[LatePart] = []

    def add(self, piece: Piece) -> None:
        length = piece.stop - piece.start
        owner = None if self._owner_of is None else self._owner_of(self._parts[piece.part], piece)
        if self._nbytes + length > CHUNK_BYTES or (owner and self._owner and owner != self._owner):
            self.close()
        self._owner = self._owner or owner
        self._pieces.append(piece)
        if piece.start == 0 and piece.stop == self._parts[piece.part].nbytes:
            self._whole.add(piece.part)
        self._nbytes += length
        self._position += length

    def add_computed(self, index: int, part: Computed) -> None:
        fits = self._nbytes + part.nbytes <= CHUNK_BYTES
        if fits and self._whole.issuperset(i for i in part.parts if self._parts[i].nbytes):
            self.add(Piece(index, 0, part.nbytes))
            return
        self.close()
        self.late.append(LatePart(index, self._position))
        self._position += part.nbytes

    def close(self) -> None:
        if self._pieces:
            start = self._position - self._nbytes
            self.blocks.append(Block(self._number, start, self._nbytes, tuple(self._pieces), self._owner))
        self._pieces = []
        self._owner = None
        self._whole = set()
        self._nbytes = 0
