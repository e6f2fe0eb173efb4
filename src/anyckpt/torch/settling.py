"""Bytes of one block that several ranks have, brought to one of them before it is written.

A plan of whole tensors (safetensors, an irregular zarr array) has blocks of 4 MiB in which rows of several ranks lie
side by side, or columns take turns.  Each such block is settled on one of these ranks, and the others send it what they
have.  Rows cost a block at each border; columns are sent whole, so that a rank then holds the blocks that it writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.engine.checksum import CHUNK_BYTES
from anyckpt.engine.plan import OutputFile, Plan, TensorData
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape, c_strides, flat_boxes
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored
from anyckpt.tensor.nodes import Mosaic
from anyckpt.tensor.views import Boxed
from anyckpt.torch.collectives import Ranks


@dataclass(frozen=True)
class _Parcel:
    """A box of a mixed block that one rank has: its first index in the tensor, its lengths, and whose it is."""

    start: Shape
    shape: Shape
    rank: int


class Settled(LazyTensor):
    """A tensor of which some runs of elements, counted in C order, have been brought to one rank each.

    Args:
        tensor: as the ranks have it.
        runs: first element of a run -> its elements, one axis.
    """

    __slots__ = ("_runs", "_tensor")

    def __init__(self, tensor: LazyTensor, runs: Mapping[int, Stored]) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self._tensor = tensor
        self._runs = dict(runs)

    def identity(self) -> Identity:
        return self._tensor, tuple(self._runs), tuple(self._runs.values())

    def pieces(self) -> Iterator[Stored]:
        at = 0
        for first, run in sorted(self._runs.items()):
            yield from self._others(at, first)
            yield run
            at = first + run.size
        yield from self._others(at, self.size)

    def _others(self, first: int, last: int) -> Iterator[Stored]:
        """What the elements between two runs are made of."""
        for start, shape in flat_boxes(self.shape, first, last - first):
            yield from self._tensor.box(start, shape).pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        inner = self._box(start, out.shape)
        if isinstance(inner, Boxed):
            for row in range(out.shape[0]):
                self.read_box((start[0] + row, *start[1:]), out[row : row + 1])
        else:
            inner.read_box((0,) * inner.ndim, out)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        first, count = _flat(self.shape, start), math.prod(shape)
        if (
            not count
            or _flat(self.shape, tuple(a + n - 1 for a, n in zip(start, shape, strict=True))) != first + count - 1
        ):
            return Boxed(self, start, shape)
        step = CHUNK_BYTES // self.dtype.itemsize
        run = self._runs.get(first // step * step)
        if run is not None and first - first // step * step + count <= run.size:
            return run.narrow(0, first % step, count).reshape(shape)
        inside = any(first < begin + piece.size and begin < first + count for begin, piece in self._runs.items())
        return Boxed(self, start, shape) if inside else self._tensor.box(start, shape)


def _flat(shape: Shape, index: Shape) -> int:
    return sum(at * step for at, step in zip(index, c_strides(shape), strict=True))


def settled(plan: Plan, ranks: Ranks, key: str) -> Plan:
    """A plan in which every block has bytes of one rank at most; collective where it was otherwise.

    Args:
        plan: the same on all ranks.
        ranks: who they are.
        key: names this save.
    """
    mixed = list(_mixed(plan))
    if not mixed:
        return plan
    load: dict[int, int] = {}
    targets = []
    for file, part, tensor, run, parcels in mixed:
        del file, part
        owners = sorted({parcel.rank for parcel in parcels})
        nbytes = run[1] * tensor.dtype.itemsize
        target = min(owners, key=lambda rank: (load.get(rank, 0), rank))
        load[target] = load.get(target, 0) + nbytes
        targets.append(target)
    received = _exchanged(mixed, targets, ranks)
    runs: dict[tuple[int, int], dict[int, Stored]] = {}
    for (file, part, tensor, (first, count), _), target, data in zip(mixed, targets, received, strict=True):
        name = plan.files[file].path
        source = None if data is None else MemorySource(data)
        owned = OwnedSource(target + 1, (key, file, part, first), count * tensor.dtype.itemsize, source, name)
        runs.setdefault((file, part), {})[first] = Stored(owned, 0, tensor.dtype, (count,))
    files = list(plan.files)
    for (file, part), found in runs.items():
        parts = list(files[file].parts)
        old = parts[part]
        assert isinstance(old, TensorData)
        parts[part] = TensorData(old.name, Settled(old.tensor, found), old.piece)
        files[file] = OutputFile(files[file].path, tuple(parts), files[file].stage)
    return replace(plan, files=tuple(files))


_Mixed = tuple[int, int, LazyTensor, tuple[int, int], list[_Parcel]]
"""File and part, the tensor, first element and number of elements of the run, and what ranks have of it."""


def _mixed(plan: Plan) -> Iterator[_Mixed]:
    """The blocks that several ranks have bytes of, in the order of the plan."""
    for file, planned in enumerate(plan.files):
        for part, data in enumerate(planned.parts):
            if not isinstance(data, TensorData) or not isinstance(data.tensor, Mosaic):
                continue
            step = CHUNK_BYTES // data.tensor.dtype.itemsize
            for first in range(0, data.tensor.size, step):
                count = min(step, data.tensor.size - first)
                parcels = list(_parcels(data.tensor, first, count))
                if len({parcel.rank for parcel in parcels}) > 1:
                    yield file, part, data.tensor, (first, count), parcels


def _parcels(tensor: Mosaic, first: int, count: int) -> Iterator[_Parcel]:
    for start, shape in flat_boxes(tensor.shape, first, count):
        yield from _held(tensor, start, shape, (0,) * tensor.ndim)


def _held(tensor: LazyTensor, start: Shape, shape: Shape, before: Shape) -> Iterator[_Parcel]:
    """What ranks have of a box of a tensor, in the indices of what begins ``before`` it."""
    if not isinstance(tensor, Mosaic):
        owner = next((piece.source.owner() for piece in tensor.pieces()), None)
        if owner is not None:
            yield _Parcel(_moved(before, start), shape, owner - 1)
        return
    for number, low, high in tensor.overlaps(start, shape):
        begin = tuple(map(int, tensor.starts[number]))
        inside = tuple(a - b for a, b in zip(low, begin, strict=True))
        extent = tuple(b - a for a, b in zip(low, high, strict=True))
        yield from _held(tensor.tiles[number], inside, extent, _moved(before, begin))


def _moved(index: Shape, by: Shape) -> Shape:
    return tuple(a + b for a, b in zip(index, by, strict=True))


def _exchanged(mixed: list[_Mixed], targets: list[int], ranks: Ranks) -> list[Array | None]:
    """The bytes of each run on the rank where it is settled, None elsewhere."""
    outgoing: dict[int, list[Array]] = {}
    expected: dict[int, int] = {}
    for (_, _, tensor, _, parcels), target in zip(mixed, targets, strict=True):
        for parcel in parcels:
            nbytes = math.prod(parcel.shape) * tensor.dtype.itemsize
            if parcel.rank == ranks.rank != target:
                outgoing.setdefault(target, []).append(_elements(tensor, parcel))
            elif parcel.rank != ranks.rank == target:
                expected[parcel.rank] = expected.get(parcel.rank, 0) + nbytes
    arrived = ranks.transfer({target: np.concatenate(parts) for target, parts in outgoing.items()}, expected)
    used = dict.fromkeys(arrived, 0)
    results: list[Array | None] = []
    for (_, _, tensor, (first, count), parcels), target in zip(mixed, targets, strict=True):
        if target != ranks.rank:
            results.append(None)
            continue
        out = np.empty(count, dtype=tensor.dtype.raw)
        for parcel in parcels:
            nbytes = math.prod(parcel.shape) * tensor.dtype.itemsize
            if parcel.rank == ranks.rank:
                data = _elements(tensor, parcel)
            else:
                begin = used[parcel.rank]
                used[parcel.rank] += nbytes
                data = arrived[parcel.rank][begin : begin + nbytes]
            _place(tensor.shape, first, out, parcel, data.view(tensor.dtype.raw))
        results.append(out.view(np.uint8))
    return results


def _elements(tensor: LazyTensor, parcel: _Parcel) -> Array:
    out = np.empty(parcel.shape, dtype=tensor.dtype.raw)
    tensor.read_box(parcel.start, out)
    return out.reshape(-1).view(np.uint8)


def _place(shape: Shape, first: int, out: Array, parcel: _Parcel, data: Array) -> None:
    """Put a box's elements where they belong in a run of the tensor's elements."""
    at = _flat(shape, parcel.start) - first
    strides = tuple(step * out.itemsize for step in c_strides(shape))
    where = np.lib.stride_tricks.as_strided(out[at:], parcel.shape, strides)
    where[...] = data.reshape(parcel.shape)
