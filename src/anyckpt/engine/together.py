"""Blocks of several output files that are filled together, because they take turns in the same bytes of a source.

Cutting a weight along its rows for tensor parallelism puts a piece of every row into each rank's file.  File by file,
each file would read the whole weight to take its pieces; together, rows are read once and dealt out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from anyckpt.blockwise import Computation, outputs_in
from anyckpt.data_classes import dataclass
from anyckpt.engine.blocks import Block
from anyckpt.engine.plan import OutputFile, TensorData
from anyckpt.indexing import Array, c_strides
from anyckpt.storage.gather import LONG_RUN, SCRATCH_BYTES, read_ahead
from anyckpt.tensor import Stored

MOST_TOGETHER = 8
"""Blocks that one thread fills together, where memory allows; each takes a buffer."""


@dataclass(frozen=True)
class Gang:
    """Blocks of different files that one thread fills together.

    Attributes:
        blocks: they have the same pieces.
        shared: for each piece, whether it is columns of the same rows in all of them.
    """

    blocks: tuple[Block, ...]
    shared: tuple[bool, ...]


def gangs(files: Sequence[OutputFile], blocks: Iterable[Block], most: int) -> Iterator[Gang]:
    """Every block once, in the order of the first of each gang; at most ``most`` in a gang."""
    columns = _Columns(files)
    waiting: dict[Any, list[Block]] = {}
    order: list[Any] = []  # blocks that are alone, and keys of gangs
    for block in blocks:
        key = columns.key(block)
        if key is None:
            order.append(block)
        else:
            if key not in waiting:
                order.append(key)
            waiting.setdefault(key, []).append(block)
    for entry in _after_what_makes_them(files, order, waiting):
        if isinstance(entry, Block):
            yield Gang((entry,), (False,) * len(entry.pieces))
        else:
            found = waiting[entry]
            for start in range(0, len(found), most):
                some = tuple(found[start : start + most])
                yield Gang(some, columns.shared(some))


def _after_what_makes_them(
    files: Sequence[OutputFile], order: list[Any], waiting: dict[Any, list[Block]]
) -> Sequence[Any]:
    """The entries with each block that holds a smaller output of a computation (scales) after those of the largest.

    By then the smaller one was computed with it and is held; the other way round the larger one would have to be.
    """
    found = _Outputs(files)
    if not found.computations:
        return order
    last: dict[int, int] = {}
    entries = [[entry] if isinstance(entry, Block) else waiting[entry] for entry in order]
    for position, blocks in enumerate(entries):
        last.update((computation, position) for computation in found.of(blocks, largest=True))
    places = [
        max([position, *(last.get(computation, -1) for computation in found.of(blocks, largest=False))])
        for position, blocks in enumerate(entries)
    ]
    return [
        order[position] for position in sorted(range(len(order)), key=lambda position: (places[position], position))
    ]


class _Outputs:
    """Which parts are outputs of computations that have several."""

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self._parts: dict[tuple[int, int], list[tuple[int, bool]]] = {}
        self.computations: list[Computation] = []
        for number, file in enumerate(files):
            for index, part in enumerate(file.parts):
                for one in outputs_in(part.tensor) if isinstance(part, TensorData) else ():
                    self.computations.append(one.computation)
                    sizes = [output.nbytes for output in one.computation.tensors()]
                    entry = (id(one.computation), sizes.index(max(sizes)) == one.number)
                    self._parts.setdefault((number, index), []).append(entry)

    def of(self, blocks: Sequence[Block], *, largest: bool) -> Iterator[int]:
        for block in blocks:
            for piece in block.pieces:
                for computation, is_largest in self._parts.get((block.file, piece.part), ()):
                    if is_largest is largest:
                        yield computation


def read_together(tensors: Sequence[Stored], start: int, outs: Sequence[Array]) -> None:
    """Fill ``outs`` with the same elements of columns of the same rows, reading each row once.

    Args:
        tensors: of one source, shape and strides.
        start: first element of each, counted in C order.
        outs: one-dimensional, of one length.

    Raises:
        FormatError: bytes are missing from the file.
    """
    offsets = sorted(tensor.offset for tensor in tensors)
    one = tensors[0]
    row, apart = math.prod(one.shape[1:]), _row_bytes(one)
    extent = offsets[-1] - offsets[0] + _extent(one)
    rows = max(1, (SCRATCH_BYTES - extent) // apart + 1)
    position, total = 0, len(outs[0])
    while position < total:
        first, inside = divmod(start + position, row)
        count = min(total - position, rows * row - inside)
        last = (start + position + count - 1) // row
        begin = offsets[0] + first * apart
        with read_ahead(one.source, begin, begin + (last - first) * apart + extent):
            for tensor, out in zip(tensors, outs, strict=True):
                tensor.read_flat(start + position, out[position : position + count])
        position += count


class _Columns:
    """Which parts are columns of the same rows."""

    def __init__(self, files: Sequence[OutputFile]) -> None:
        alike: dict[Any, list[tuple[Stored, int, int]]] = {}
        for number, file in enumerate(files):
            for index, part in enumerate(file.parts):
                tensor = part.tensor if isinstance(part, TensorData) else None
                if isinstance(tensor, Stored) and _is_column(tensor):
                    key = (id(tensor.source), tensor.shape, tensor.strides, tensor.dtype.name)
                    alike.setdefault(key, []).append((tensor, number, index))
        self._rows: dict[tuple[int, int], int] = {}
        count = 0
        for found in alike.values():
            end = -1
            for tensor, number, index in sorted(found, key=lambda entry: entry[0].offset):
                if tensor.offset + _extent(tensor) > end:
                    count, end = count + 1, tensor.offset + _row_bytes(tensor)
                self._rows[number, index] = count
        self._sizes = {
            number: hash(tuple(part.nbytes for part in files[number].parts))
            for number in {key[0] for key in self._rows}
        }

    def key(self, block: Block) -> Any:
        """Equal for blocks that are filled together; None if the block shares nothing."""
        shared = [self._rows.get((block.file, piece.part)) for piece in block.pieces]
        return (self._sizes[block.file], block.pieces, tuple(shared)) if any(shared) else None

    def shared(self, gang: Sequence[Block]) -> tuple[bool, ...]:
        """For each piece of the gang's blocks, whether it is columns of the same rows."""
        first = gang[0]
        return tuple(len(gang) > 1 and (first.file, piece.part) in self._rows for piece in first.pieces)


def _is_column(tensor: Stored) -> bool:
    """It has a short piece of each of many rows, one after the other in the source."""
    if tensor.strides is None or tensor.ndim < 2 or tensor.shape[0] < 2 or not tensor.size:
        return False
    extent = _extent(tensor)
    inner = tensor.strides[1:] == c_strides(tensor.shape[1:])
    return inner and extent < LONG_RUN and 2 * extent <= _row_bytes(tensor) <= SCRATCH_BYTES


def _row_bytes(tensor: Stored) -> int:
    assert tensor.strides is not None
    return tensor.strides[0] * tensor.dtype.itemsize


def _extent(tensor: Stored) -> int:
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
