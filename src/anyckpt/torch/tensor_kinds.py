"""Which boxes of a whole tensor a rank has, for every kind of tensor that torch has.

Kinds are told apart by ``KINDS``, functions that are asked in turn what a leaf is.  An entity of another framework is
one more kind; what a kind gives need not be named by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from anyckpt.dtypes import DType, dtype
from anyckpt.errors import FormatError, UsageError
from anyckpt.indexing import Shape
from anyckpt.operations.steps.live import obstacle
from anyckpt.torch.live import LiveObject, LivePiece, Put

Found = Sequence[LivePiece] | LiveObject
Kind = Callable[[str, Any, Put], Found | None]
"""What a leaf is, from its name by path, its value and what replaces it; None if it is of another kind."""


def of_tensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A whole tensor of one process: ranks that have it have it alike."""
    if not isinstance(leaf, torch.Tensor):
        return None
    local = _elements(name, leaf)
    return [LivePiece(name, dtype_of(name, local), tuple(local.shape), (0,) * local.ndim, local)]


def of_dtensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A DTensor: FSDP2, tensor parallelism, meshes of several axes, uneven shards.

    Where a shard of ``_StridedShard`` is several runs of the whole, each is a piece.
    """
    if not hasattr(leaf, "device_mesh") or not hasattr(leaf, "placements") or not isinstance(leaf, torch.Tensor):
        return None
    dtensor: Any = leaf
    mesh, coordinate = dtensor.device_mesh, dtensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    ways = []
    for placement in dtensor.placements:
        if placement.is_partial():
            raise UsageError(
                "is a DTensor with partial sums, of which no rank has the elements",
                tensor=name,
                remedy="redistribute it to Shard or Replicate",
            )
        ways.append((getattr(placement, "dim", None), getattr(placement, "split_factor", 1)))
    shard = dtensor.to_local()
    if hasattr(shard, "trigger_wait"):  # of a collective that may not have ended
        shard = shard.trigger_wait()
    local = _elements(name, shard)
    kind, shape = dtype_of(name, local), tuple(dtensor.shape)
    boxes = _shard_boxes(shape, tuple(ways), tuple(coordinate), tuple(mesh.shape))
    if len(boxes) == 1 and boxes[0][2] == local.shape and 0 not in local.shape:
        return [LivePiece(name, kind, shape, boxes[0][0], local)]
    found = []
    for offset, start, sizes in boxes:
        part = local
        for axis, (begin, length) in enumerate(zip(start, sizes, strict=True)):
            part = part.narrow(axis, begin, length)
        if part.numel():
            found.append(LivePiece(name, kind, shape, offset, part))
    return found or ([LivePiece(name, kind, shape, (0,) * len(shape), local)] if 0 in shape else [])


def of_sharded_tensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A ShardedTensor of torch's first generation (FSDP's ``SHARDED_STATE_DICT``)."""
    if type(leaf).__name__ != "ShardedTensor" or not hasattr(leaf, "local_shards"):
        return None
    shape = tuple(leaf.metadata().size)
    found = []
    for shard in leaf.local_shards():
        local = _elements(name, shard.tensor)
        offset = tuple(shard.metadata.shard_offsets)
        found.append(LivePiece(name, dtype_of(name, local), shape, offset, local))
    return found


def shard_runs(runs: Sequence[tuple[int, int]], count: int, index: int, split_factor: int = 1) -> list[tuple[int, int]]:
    """The runs (start, length) of an axis that one of ``count`` shards takes of the runs that are given.

    Args:
        runs: what is divided, in order.
        count: number of shards; each has the length rounded up, the last ones what is left, as ``torch.chunk``.
        index: which.
        split_factor: of ``_StridedShard``: what is given is first divided so, and each part divided into shards.
    """
    total = sum(length for _, length in runs)
    found: list[tuple[int, int]] = []
    part = -(-total // split_factor)
    for number in range(split_factor):
        first, last = min(total, number * part), min(total, (number + 1) * part)
        step = -(-(last - first) // count)
        start, stop = min(last, first + index * step), min(last, first + (index + 1) * step)
        for begin, length in _between(runs, start, stop):
            if found and sum(found[-1]) == begin:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((begin, length))
    return found


def _between(runs: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The runs of elements ``[start, stop)``, counted along the runs."""
    before = 0
    for begin, length in runs:
        low, high = max(start, before), min(stop, before + length)
        if high > low:
            yield begin + low - before, high - low
        before += length


@lru_cache(maxsize=1 << 14)
def _shard_boxes(
    shape: Shape, ways: tuple[tuple[int | None, int], ...], coordinate: Shape, mesh: Shape
) -> tuple[tuple[Shape, Shape, Shape], ...]:
    """The boxes of a whole tensor that one rank has: where each begins in the whole, and in its local tensor; lengths.

    Args:
        shape: the whole's.
        ways: for each axis of the mesh the axis of the tensor that is divided along it, None if none is, and how often
            that is divided before (see ``shard_runs``).
        coordinate: the rank's.
        mesh: its lengths.
    """
    runs = [[(0, length)] for length in shape]
    for (along, split), index, count in zip(ways, coordinate, mesh, strict=True):
        if along is not None:
            runs[along] = shard_runs(runs[along], count, index, split)
    before = [[sum(length for _, length in axis[:number]) for number in range(len(axis))] for axis in runs]
    return tuple(
        (
            tuple(runs[axis][number][0] for axis, number in enumerate(chosen)),
            tuple(before[axis][number] for axis, number in enumerate(chosen)),
            tuple(runs[axis][number][1] for axis, number in enumerate(chosen)),
        )
        for chosen in product(*(range(len(axis)) for axis in runs))
    )


def _elements(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its gradient's history, whose elements are in memory.

    Raises:
        UsageError: they are not, or are more than numbers.
    """
    problem = obstacle(torch, tensor)
    if problem is not None:
        problem.tensor = name
        raise problem
    plain = tensor.detach()
    return plain.data if type(plain) is torch.nn.Parameter else plain


def dtype_of(name: str, tensor: torch.Tensor) -> DType:
    """The element type of a live tensor.

    Raises:
        UsageError: it is none that files have.
    """
    try:
        return _of_torch(tensor.dtype)
    except FormatError as error:
        raise UsageError(error.problem, tensor=name, expected=error.expected) from None


_of_torch = lru_cache(maxsize=None)(dtype)
"""The entry of an element type; the state of a large model has ten thousands of tensors of a few types."""


KINDS: list[Kind] = [of_sharded_tensor, of_dtensor, of_tensor]
"""Asked in turn; what is of none is an object."""
