"""Lazy tensors whose elements along the last axis lie in blocks: numbers of blocks, and blocks of numbers."""

from __future__ import annotations

from abc import abstractmethod
from math import prod

import numpy as np

from anyckpt.dtypes import dtype
from anyckpt.formats.gguf.blocks import decode, encode
from anyckpt.formats.gguf.types import ElementType
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import hole, is_hole, scratch
from anyckpt.tensor import Boxed, LazyTensor, Permuted, Reshaped, View

_FLOAT32, _BYTE = dtype("float32"), dtype("uint8")
_AT_ONCE = 1 << 19
"""Elements that are computed at once: many, so that threads seldom wait for the interpreter."""


class _OfBlocks(View):
    """Rows of units, one for some of the child's: views that leave rows whole are taken of the child.

    Args:
        child: rows of ``taken`` elements for each ``given`` of the tensor's.
        kind: the type of the blocks.
    """

    __slots__ = ("given", "kind", "taken")

    def __init__(self, child: LazyTensor, kind: ElementType) -> None:
        self.child = child
        self.kind = kind
        self.shape = (*child.shape[:-1], child.shape[-1] // self.taken * self.given)

    given: int
    taken: int

    def identity(self) -> Identity:
        return type(self).__name__, self.child, self.kind.name

    @abstractmethod
    def computed(self, units: Array) -> Array:
        """Of ``[blocks, taken]`` raw elements the ``[blocks, given]`` ones."""

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        low, high = start[-1], start[-1] + out.shape[-1]
        first, last = low // self.given, -(-high // self.given)
        shape = (*out.shape[:-1], (last - first) * self.taken)
        begin = (*start[:-1], first * self.taken)
        if is_hole(out):
            self.child.read_box(begin, hole(shape, self.child.dtype.raw))
            return
        axis = next((axis for axis, count in enumerate(out.shape[:-1]) if count > 1), None)
        if axis is not None and prod(shape) > _AT_ONCE:
            step = max(1, out.shape[axis] * _AT_ONCE // prod(shape))
            for at in range(0, out.shape[axis], step):
                part = out[(slice(None),) * axis + (slice(at, at + step),)]
                self.read_box((*start[:axis], start[axis] + at, *start[axis + 1 :]), part)
            return
        raw = self.child.dtype.raw
        with scratch(prod(shape) * raw.itemsize) as buffer:
            read = buffer.view(raw).reshape(shape)
            self.child.read_box(begin, read)
            made = self.computed(read.reshape(-1, self.taken)).reshape(*out.shape[:-1], -1)
            out[...] = made[..., low - first * self.given : high - first * self.given].view(out.dtype)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        if start[-1] % self.given or shape[-1] % self.given:
            return Boxed(self, start, shape)
        begin, extent = ((*edge[:-1], edge[-1] // self.given * self.taken) for edge in (start, shape))
        return type(self)(self.child.box(begin, extent), self.kind)

    def _reshape(self, shape: Shape) -> LazyTensor:
        if not shape or shape[-1] != self.shape[-1]:
            return Reshaped(self, shape)
        return type(self)(self.child.reshape((*shape[:-1], self.child.shape[-1])), self.kind)

    def _permute(self, axes: Shape) -> LazyTensor:
        if axes[-1] != self.ndim - 1:
            return Permuted(self, axes)
        return type(self)(self.child.permute(axes), self.kind)


class Decoded(_OfBlocks):
    """The float32 numbers of blocks; ``child`` is uint8, its rows whole blocks."""

    __slots__ = ()

    def __init__(self, child: LazyTensor, kind: ElementType) -> None:
        self.given, self.taken = kind.block, kind.nbytes
        self.dtype = _FLOAT32
        super().__init__(child, kind)

    def computed(self, units: Array) -> Array:
        return decode(self.kind.name, units)


class Encoded(_OfBlocks):
    """Blocks of float32 numbers; ``child`` has them, its rows whole blocks."""

    __slots__ = ()

    def __init__(self, child: LazyTensor, kind: ElementType) -> None:
        self.given, self.taken = kind.nbytes, kind.block
        self.dtype = _BYTE
        super().__init__(child, kind)

    def computed(self, units: Array) -> Array:
        return encode(self.kind.name, units.view(np.float32))
