"""Lazy tensors that are made of others: views, and element-wise functions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.identity import ElementWise, Identity
from anyckpt.indexing import (
    Array,
    Shape,
    flat_boxes,
    runs,
)
from anyckpt.storage.gather import SCRATCH_BYTES, hole, is_hole, scratch
from anyckpt.tensor.halves import widen
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


class Combined(LazyTensor):
    """A tensor whose every element follows from those in the same place of others, all of one shape."""

    __slots__ = ("children",)
    children: tuple[LazyTensor, ...]

    def _most(self) -> int:
        """How many elements are computed at a time."""
        return SCRATCH_BYTES // max(child.dtype.itemsize for child in self.children)

    @abstractmethod
    def _compute(self, start: Shape, out: Array) -> None:
        """Fill ``out``, not empty and of no more elements than that, with the box from ``start`` on."""

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        if is_hole(out):
            for child in self.children:
                child.read_box(start, hole(out.shape, child.dtype.raw))
            return
        most = self._most()
        if out.size <= most or not out.ndim:
            self._compute(start, out)
            return
        axis = next(a for a, n in enumerate(out.shape) if n > 1)
        step = max(1, out.shape[axis] * most // out.size)
        for at in range(0, out.shape[axis], step):
            where = (slice(None),) * axis + (slice(at, at + step),)
            self.read_box((*start[:axis], start[axis] + at, *start[axis + 1 :]), out[where])

    def pieces(self) -> Iterator[Stored]:
        for child in self.children:
            yield from child.pieces()


class Pointwise(Combined):
    """The same where elements do not depend on the place, so that a view of it is made of views of the others."""

    __slots__ = ()

    @abstractmethod
    def _of(self, children: Iterator[LazyTensor]) -> LazyTensor:
        """The same of other tensors."""

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return self._of(child.box(start, shape) for child in self.children)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return self._of(child.reshape(shape) for child in self.children)

    def _permute(self, axes: Shape) -> LazyTensor:
        return self._of(child.permute(axes) for child in self.children)


class Mapped(Pointwise):
    """An element-wise function of tensors of one shape.

    Args:
        children: the operands.
        dtype: element type of the result.
        function: from arrays of the operands' numpy types to an array of the result's; may run in any thread.  An
            ``ElementWise``, or a function that can be imported by its name; with any other the work cannot be resumed.
    """

    __slots__ = ("function",)

    def __init__(self, children: tuple[LazyTensor, ...], dtype: DType, function: Callable[..., Array]) -> None:
        self.children = children
        self.dtype = dtype
        self.shape = children[0].shape
        self.function = function

    def identity(self) -> Identity:
        return self.children, self.dtype, self.function

    def _of(self, children: Iterator[LazyTensor]) -> LazyTensor:
        return Mapped(tuple(children), self.dtype, self.function)

    def _compute(self, start: Shape, out: Array) -> None:
        self._apply(start, out, ())

    def _apply(self, start: Shape, out: Array, operands: tuple[Array, ...]) -> None:
        """The function of the operands that have been read and of the others."""
        if len(operands) == len(self.children):
            if isinstance(self.function, ElementWise) and self.dtype.numpy is not None:
                self.function.into(out.view(self.dtype.numpy), *operands)
            else:
                out[...] = self.function(*operands).view(self.dtype.raw)
            return
        child = self.children[len(operands)]
        with scratch(out.size * child.dtype.itemsize) as buffer:
            raw = buffer.view(child.dtype.raw).reshape(out.shape)
            child.read_box(start, raw)
            self._apply(start, out, (*operands, as_numbers(raw, child.dtype)))


class ElementWiseInto(ElementWise):
    """An element-wise function that is computed where its result is wanted.

    Attributes:
        to: element type of the result.
    """

    to: DType

    def __call__(self, *arrays: Array) -> Array:
        result = np.empty(arrays[0].shape, self.to.numpy)
        self.into(result, *arrays)
        return result

    @abstractmethod
    def into(self, out: Array, *arrays: Any) -> None: ...


@dataclass(frozen=True)
class Cast(ElementWiseInto):
    """Rounding to another element type, to nearest, ties to even."""

    to: DType

    def into(self, out: Array, array: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            widen(out, array)
