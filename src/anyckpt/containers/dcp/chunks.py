"""How a tensor is cut into chunks for writing: bounded, and where a training process will want its pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape

_LAYERS = re.compile(r"(^|\.)layers\.(?!\d)")
_EXPERTS = re.compile(r"(^|\.)experts\.experts\.(?!\d)")


@dataclass(frozen=True)
class HeldBox:
    """A box of a tensor that one of the processes that write together has in memory.

    Attributes:
        start: index of its first element.
        shape: elements along each axis.
        rank: of the process, from 0.
    """

    start: Shape
    shape: Shape
    rank: int


Held = Mapping[str, Sequence[HeldBox]]
"""The boxes of each tensor, which cover it once."""


def stacked_axes(name: str) -> int:
    """How many leading axes of a Megatron-Core tensor count layers or experts rather than weights.

    A homogeneous block stores all its layers under one name without a number, with the layer as first axis; its
    experts likewise, as second axis (Megatron-Core 0.12 to 0.20).
    """
    return bool(_LAYERS.search(name)) + bool(_EXPERTS.search(name))


def cut(shape: Shape, itemsize: int, *, stacked: int = 0, limit: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes (start, shape) that cover ``shape``, in C order, each of at most ``limit`` bytes where a row allows.

    Args:
        shape: the tensor's.
        itemsize: bytes of an element.
        stacked: leading axes along which every index is a chunk of its own.
        limit: bytes.
    """
    if not math.prod(shape):
        yield (0,) * len(shape), shape
        return
    yield from _cut((), shape, itemsize, min(stacked, len(shape) - 1), limit)


def _cut(before: Shape, shape: Shape, itemsize: int, stacked: int, limit: int) -> Iterator[tuple[Shape, Shape]]:
    whole = math.prod(shape) * itemsize
    if not shape or (stacked <= 0 and whole <= limit):
        yield before + (0,) * len(shape), (1,) * len(before) + shape
        return
    row = whole // shape[0]
    if stacked > 0 or (row > limit and len(shape) > 1):
        for index in range(shape[0]):
            yield from _cut((*before, index), shape[1:], itemsize, stacked - 1, limit)
        return
    step = max(1, limit // row)
    # As even as possible, so that no piece is much smaller than the others.
    step = -(-shape[0] // -(-shape[0] // step))
    for start in range(0, shape[0], step):
        length = min(step, shape[0] - start)
        yield (*before, start, *(0,) * (len(shape) - 1)), ((1,) * len(before) + (length, *shape[1:]))
