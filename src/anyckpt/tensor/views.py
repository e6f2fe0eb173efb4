"""Lazy tensors that are made of others: views, and element-wise functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.identity import ElementWise, Identity
from anyckpt.indexing import (
    Array,
    Shape,
    flat_boxes,
    runs,
)
from anyckpt.storage.gather import SCRATCH_BYTES, Hole, hole, scratch
from anyckpt.tensor.lazy import LazyTensor, as_numbers

if TYPE_CHECKING:
    from anyckpt.tensor.nodes import Stored


class View(LazyTensor):
    """A tensor that is made of one other; of its type and shape unless a subclass gives it others."""

    __slots__ = ("child",)
    child: LazyTensor

    def __init__(self, child: LazyTensor) -> None:
        self.child = child
        self.dtype = child.dtype
        self.shape = child.shape

    def pieces(self) -> Iterator[Stored]:
        return self.child.pieces()


class Boxed(View):
    """A box of a tensor that has no better way to describe it."""

    __slots__ = ("start",)

    def __init__(self, child: LazyTensor, start: Shape, shape: Shape) -> None:
        self.child = child
        self.start = start
        self.shape = shape
        self.dtype = child.dtype

    def identity(self) -> Identity:
        return self.child, self.start, self.shape

    def read_box(self, start: Shape, out: Array) -> None:
        self.child.read_box(tuple(a + b for a, b in zip(self.start, start, strict=True)), out)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Boxed(self.child, tuple(a + b for a, b in zip(self.start, start, strict=True)), shape)


class Permuted(View):
    """Axes in another order; axis ``i`` is the child's axis ``axes[i]``."""

    __slots__ = ("axes",)

    def __init__(self, child: LazyTensor, axes: Shape) -> None:
        self.child = child
        self.axes = axes
        self.shape = tuple(child.shape[a] for a in axes)
        self.dtype = child.dtype

    def identity(self) -> Identity:
        return self.child, self.axes

    def _inverse(self, values: Shape) -> Shape:
        back = [0] * len(values)
        for position, axis in enumerate(self.axes):
            back[axis] = values[position]
        return tuple(back)

    def read_box(self, start: Shape, out: Array) -> None:
        self.child.read_box(self._inverse(start), out.transpose(self._inverse(tuple(range(out.ndim)))))

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Permuted(self.child.box(self._inverse(start), self._inverse(shape)), self.axes)

    def _permute(self, axes: Shape) -> LazyTensor:
        return self.child.permute(tuple(self.axes[a] for a in axes))


class Reshaped(View):
    """The same elements in C order under another shape."""

    __slots__ = ()

    def __init__(self, child: LazyTensor, shape: Shape) -> None:
        self.child = child
        self.shape = shape
        self.dtype = child.dtype

    def identity(self) -> Identity:
        return self.child, self.shape

    def read_flat(self, start: int, out: Array) -> None:
        self.child.read_flat(start, out)

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        common = 0
        for a, b in zip(reversed(self.shape), reversed(self.child.shape), strict=False):
            if a != b:
                break
            common += 1
        lead, child_lead = self.ndim - common, self.child.ndim - common
        for first, part in runs(self.shape[:lead], start[:lead], out):
            position = 0
            for box_start, box_shape in flat_boxes(self.child.shape[:child_lead], first, part.shape[0]):
                count = math.prod(box_shape)
                rows = part[position : position + count]
                self.child.read_box(box_start + start[lead:], rows.reshape(box_shape + rows.shape[1:]))
                position += count

    def _reshape(self, shape: Shape) -> LazyTensor:
        return self.child.reshape(shape)


class Mapped(LazyTensor):
    """An element-wise function of tensors of one shape.

    Args:
        children: the operands.
        dtype: element type of the result.
        function: from arrays of the operands' numpy types to an array of the result's; may run in any thread.  An
            ``ElementWise``, or a function that can be imported by its name; with any other the work cannot be resumed.
    """

    __slots__ = ("children", "function")

    def __init__(self, children: tuple[LazyTensor, ...], dtype: DType, function: Callable[..., Array]) -> None:
        self.children = children
        self.dtype = dtype
        self.shape = children[0].shape
        self.function = function

    def identity(self) -> Identity:
        return self.children, self.dtype, self.function

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        if isinstance(out, Hole):
            for child in self.children:
                child.read_box(start, hole(out.shape, child.dtype.raw))
            return
        widest = max(child.dtype.itemsize for child in self.children)
        if out.size * widest > SCRATCH_BYTES and out.ndim:
            axis = next(a for a, n in enumerate(out.shape) if n > 1)
            step = max(1, out.shape[axis] * SCRATCH_BYTES // (out.size * widest))
            for at in range(0, out.shape[axis], step):
                where = (slice(None),) * axis + (slice(at, at + step),)
                self.read_box((*start[:axis], start[axis] + at, *start[axis + 1 :]), out[where])
            return
        self._compute(start, out, 0, ())

    def _compute(self, start: Shape, out: Array, number: int, operands: tuple[Array, ...]) -> None:
        if number == len(self.children):
            if isinstance(self.function, ElementWise) and self.dtype.numpy is not None:
                self.function.into(out.view(self.dtype.numpy), *operands)
            else:
                out[...] = self.function(*operands).view(self.dtype.raw)
            return
        child = self.children[number]
        with scratch(out.size * child.dtype.itemsize) as buffer:
            raw = buffer.view(child.dtype.raw).reshape(out.shape)
            child.read_box(start, raw)
            self._compute(start, out, number + 1, (*operands, as_numbers(raw, child.dtype)))

    def pieces(self) -> Iterator[Stored]:
        for child in self.children:
            yield from child.pieces()

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Mapped(tuple(c.box(start, shape) for c in self.children), self.dtype, self.function)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return Mapped(tuple(c.reshape(shape) for c in self.children), self.dtype, self.function)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Mapped(tuple(c.permute(axes) for c in self.children), self.dtype, self.function)


@dataclass(frozen=True)
class Cast(ElementWise):
    """Rounding to another element type, to nearest, ties to even."""

    target: DType

    def __call__(self, array: Array) -> Array:
        result = np.empty(array.shape, self.target.numpy)
        self.into(result, array)
        return result

    def into(self, out: Array, array: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, array, casting="unsafe")
