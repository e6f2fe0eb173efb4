"""Lazy tensors: a dtype, a shape, and where each piece lies.

Slicing, joining, reshaping and permuting give another description and read nothing.  Reading asks for a box
(a hyper-rectangle) or for a run of elements in C order, which is what a writer needs; either touches only the
bytes that it returns.  Only casts and arithmetic compute, box by box.

Boxes are delivered into caller-provided arrays of the *raw* dtype (unsigned integers of the element's width,
see ``dtypes``), so that joining two QKV shards and joining two fp8 scales are the same copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from anyckpt.dtypes import DType, dtype, from_numpy
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.identity import ElementWise, Identity
from anyckpt.indexing import (
    Array,
    Shape,
    c_strides,
    check_cover,
    flat_boxes,
    moved_unit_axes,
    reshaped_strides,
    runs,
    with_axes,
)
from anyckpt.storage.gather import SCRATCH_BYTES, Hole, gather, hole, needed, scratch
from anyckpt.storage.requests import holding, in_few, is_far
from anyckpt.storage.source import ByteSource, MemorySource

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted

_MATERIALISE_LIMIT = 64
_COPIED_BYTES = 4096
_COMPUTED_BYTES = 1 << 19  # of the widest operand: all of them stay in the cache


class LazyTensor(ABC):
    """A tensor that has not been read.

    Attributes:
        dtype: element type.
        shape: elements along each axis.
    """

    __slots__ = ("dtype", "shape")
    dtype: DType
    shape: Shape

    # -- reading ---------------------------------------------------------------------------------------------

    @abstractmethod
    def read_box(self, start: Shape, out: Array) -> None:
        """Fill ``out`` with the box of its shape that begins at ``start``.

        Args:
            start: first index along each axis; the box must lie inside the tensor.
            out: array of raw dtype, of any strides.

        Raises:
            FormatError: bytes are missing from a file.
        """

    @abstractmethod
    def pieces(self) -> Iterator[Stored]:
        """Every stored piece that the tensor is made of, in no stated order."""

    def identity(self) -> Identity | None:
        """Values that tell its elements from all others (see ``anyckpt.identity``); None if there are none."""
        return None

    def read_flat(self, start: int, out: Array) -> None:
        """Fill the one-dimensional ``out`` with elements ``start`` and following, counted in C order.

        Raises:
            FormatError: bytes are missing from a file.
        """
        position = 0
        for box_start, box_shape in flat_boxes(self.shape, start, out.shape[0]):
            count = math.prod(box_shape)
            self.read_box(box_start, out[position : position + count].reshape(box_shape))
            position += count

    @property
    def is_far(self) -> bool:
        """Whether reading means waiting, so that many ranges are asked for at once; its first piece tells."""
        piece = next(self.pieces(), None)
        return piece is not None and is_far(piece.source)

    def fill(self, start: int, out: Array) -> None:
        """As ``read_flat``; of a far tensor, what is needed is asked for at once.

        Raises:
            FormatError: bytes are missing from a file.
        """
        if not self.is_far:
            self.read_flat(start, out)
            return
        in_few(
            lambda first, last: self.read_flat(start + first, out[first:last]),
            lambda first, last: self.needed(start + first, last - first),
            0,
            len(out),
        )

    def needed(self, start: int, count: int) -> list[Wanted]:
        """The ranges of far sources that a run of elements needs; reads nothing, except of a node that computes."""
        return needed(lambda: self.read_flat(start, hole((count,), self.dtype.raw)))

    def numpy(self) -> Array:
        """The whole tensor as an array; ml_dtypes types for bfloat16 and fp8, unsigned integers of the element's width
        for what numpy cannot compute with.

        It is read into memory of its own; ``np.asarray(tensor)`` is a read-only mapping of the file where possible.

        Raises:
            FormatError: bytes are missing from a file.
            UsageError: the tensor repeats stored bytes so often that an array of it is a denial of service.
        """
        stored = sum(piece.stored_bytes() for piece in self.pieces())
        if self.nbytes > max(1 << 20, _MATERIALISE_LIMIT * stored) and stored:
            raise UsageError(
                "repeats a few stored values so often that it is not read whole",
                expected=f"at most {_MATERIALISE_LIMIT} times its {stored} stored bytes",
                found=f"{self.nbytes} bytes",
                remedy="read slices of it",
            )
        out = np.empty(self.shape, dtype=self.dtype.raw)
        if out.size:
            self.fill(0, out.reshape(-1)) if self.is_far else self.read_box((0,) * self.ndim, out)
        return as_numbers(out, self.dtype)

    def chunks(self, nbytes: int = SCRATCH_BYTES) -> Iterator[Array]:
        """The elements in C order, as one-dimensional arrays of at most ``nbytes``; each is valid until the next.

        Raises:
            FormatError: bytes are missing from a file.
        """
        step = max(1, nbytes // self.dtype.itemsize)
        buffer = np.empty(min(step, self.size), dtype=self.dtype.raw)
        for start in range(0, self.size, step):
            part = buffer[: min(step, self.size - start)]
            self.fill(start, part)
            yield as_numbers(part, self.dtype)

    # -- facts -----------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements in C order, whatever is stored."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype.name}, shape={self.shape}, {self.nbytes:,} bytes)"

    def _repr_html_(self) -> str:
        from anyckpt.escaping import html_table

        row = (self.dtype.name, str(list(self.shape)), f"{self.nbytes:,} bytes")
        return html_table(type(self).__name__, ("type", "shape", "size"), [row])

    # -- arrays of other libraries ---------------------------------------------------------------------------

    def region(self) -> Stored | None:
        """The tensor as one strided region of a source; None if it is put together or computed."""
        return None

    def torch(self, *, copy: bool | None = None) -> Any:
        """The whole tensor as a ``torch.Tensor`` of its own type and shape; imports torch.

        Where a local file has the elements as they are in memory, the tensor is a mapping of the file and nothing is
        read yet; what is written to it stays in the process.  Of ``quint8`` and such it has the codes.

        Args:
            copy: memory of its own (True), a mapping of the file (False), or this where possible (None).

        Raises:
            FormatError: bytes are missing from a file.
            MissingLibraryError: torch is not installed.
            UsageError: torch has no such element type, or ``copy`` is False and there is no mapping.
        """
        from anyckpt.views import TorchFiles

        return TorchFiles().tensor(self, copy=copy)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        from anyckpt.views import array_of

        return array_of(self, dtype, copy)

    def __dlpack__(self, **options: Any) -> Any:
        from anyckpt.views import for_dlpack

        return for_dlpack(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the processor's memory

    # -- algebra ---------------------------------------------------------------------------------------------

    def narrow(self, axis: int, start: int, length: int) -> LazyTensor:
        """The part with indices ``[start, start + length)`` along ``axis``."""
        begin = [0] * self.ndim
        begin[axis] = start
        shape = [*self.shape]
        shape[axis] = length
        return self.box(tuple(begin), tuple(shape))

    def box(self, start: Shape, shape: Shape) -> LazyTensor:
        """The box of the given shape that begins at ``start``.

        Raises:
            UsageError: it is not inside the tensor.
        """
        if (
            len(start) != self.ndim
            or len(shape) != self.ndim
            or any(b < 0 or n < 0 or b + n > whole for b, n, whole in zip(start, shape, self.shape, strict=True))
        ):
            raise UsageError("a slice lies outside the tensor", expected=self.shape, found=f"{start} + {shape}")
        if shape == self.shape:
            return self
        return self._box(start, shape)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Boxed(self, start, shape)

    def __getitem__(self, key: Any) -> LazyTensor:
        """As numpy's basic indexing: integers, slices with positive steps, ellipsis.

        Raises:
            UsageError: an index is something else, there are too many, or one lies outside the tensor.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in [k for k in keys if k is Ellipsis]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) > self.ndim:
            raise UsageError("too many indices", expected=f"{self.ndim} at most", found=len(keys))
        start: list[int] = []
        shape: list[int] = []
        steps: list[int] = []
        for k, whole in zip(keys, self.shape, strict=True):
            if isinstance(k, slice):
                first, last, step = k.indices(whole)
                if step < 1:
                    raise UsageError("a slice's step must be positive", found=step)
                start.append(first)
                shape.append(max(0, last - first))
                steps.append(step)
            elif isinstance(k, bool) or not isinstance(k, SupportsIndex):
                raise UsageError("an index is neither a whole number nor a slice", found=repr(k)[:80])
            else:
                at = index(k) + (whole if index(k) < 0 else 0)
                if not 0 <= at < whole:
                    raise UsageError("an index lies outside the tensor", expected=f"less than {whole}", found=k)
                start.append(at)
                shape.append(1)
                steps.append(1)
        result = self.box(tuple(start), tuple(shape))
        for axis, step in enumerate(steps):
            if step > 1:
                result = result.every(axis, step)
        if all(isinstance(k, slice) for k in keys):
            return result
        return result.reshape(tuple(n for k, n in zip(keys, result.shape, strict=True) if isinstance(k, slice)))

    def every(self, axis: int, step: int) -> LazyTensor:
        """Each ``step``-th index along ``axis``, from the first on."""
        whole, length = self.shape[axis], -(-self.shape[axis] // step)
        padded: LazyTensor = self
        if whole % step:
            missing = [*self.shape]
            missing[axis] = step - whole % step
            padded = concatenate([self, Constant(self.dtype, tuple(missing))], axis)
        split = (*self.shape[:axis], length, step, *self.shape[axis + 1 :])
        joined = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        return padded.reshape(split).narrow(axis + 1, 0, 1).reshape(joined)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """The same elements in C order under another shape; one length may be -1.

        Raises:
            UsageError: the number of elements differs.
        """
        wanted = tuple(shape)
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted = tuple(self.size // known if n == -1 and known else n for n in wanted)
        if math.prod(wanted) != self.size or any(n < 0 for n in wanted):
            raise UsageError("cannot be reshaped", expected=f"{self.size} elements", found=tuple(shape))
        if not self.size:
            return Constant(self.dtype, wanted)
        return self if wanted == self.shape else self._reshape(wanted)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return Reshaped(self, shape)

    def permute(self, axes: Sequence[int]) -> LazyTensor:
        """Axes in another order, as ``numpy.transpose``.

        Raises:
            UsageError: ``axes`` is not a permutation.
        """
        order = tuple(axes)
        if sorted(order) != list(range(self.ndim)):
            raise UsageError("is not an order of the axes", expected=f"a permutation of {self.ndim}", found=order)
        return self if order == tuple(range(self.ndim)) else self._permute(order)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Permuted(self, axes)

    def transpose(self) -> LazyTensor:
        """Axes in reverse order."""
        return self.permute(range(self.ndim)[::-1])

    @property
    def T(self) -> LazyTensor:  # noqa: N802 (numpy's and torch's name)
        """The tensor with its axes in reverse order."""
        return self.transpose()

    def cast(self, to: DType | str) -> LazyTensor:
        """The values rounded to another type (to nearest, ties to even), or self if it is the same.

        Raises:
            UsageError: either type is one that numpy cannot compute with.
        """
        target = dtype(to)
        if target == self.dtype:
            return self
        if self.dtype.numpy is None or target.numpy is None:
            raise UsageError(f"{self.dtype.name} cannot be cast to {target.name}")
        return Mapped((self,), target, Cast(target))

    def pad(self, axis: int, length: int) -> LazyTensor:
        """Zeros appended along ``axis`` up to ``length``.

        Raises:
            UsageError: the axis is longer than that.
        """
        extra = length - self.shape[axis]
        if extra < 0:
            raise UsageError("cannot be padded to fewer", expected=f"at least {self.shape[axis]}", found=length)
        if not extra:
            return self
        shape = [*self.shape]
        shape[axis] = extra
        return concatenate([self, Constant(self.dtype, tuple(shape))], axis)


class Stored(LazyTensor):
    """A strided region of a source: what a file format's reader makes.

    Args:
        source: where the bytes are.
        offset: byte at which the element with index zero begins.
        dtype: element type; little-endian.
        shape: elements along each axis.
        strides: elements between neighbours along each axis, none negative; C order if None.
    """

    __slots__ = ("offset", "source", "strides")

    def __init__(
        self, source: ByteSource, offset: int, dtype: DType, shape: Shape, strides: Shape | None = None
    ) -> None:
        self.source = source
        self.offset = offset
        self.dtype = dtype
        self.shape = shape
        self.strides = strides if strides != c_strides(shape) else None

    def identity(self) -> Identity:
        return self.source, self.offset, self.dtype, self.shape, self.strides

    def read_box(self, start: Shape, out: Array) -> None:
        itemsize = self.dtype.itemsize
        strides = self.strides or c_strides(self.shape)
        first = self.offset + itemsize * sum(b * s for b, s in zip(start, strides, strict=True))
        gather(self.source, first, tuple(s * itemsize for s in strides), out)

    def pieces(self) -> Iterator[Stored]:
        yield self

    def region(self) -> Stored:
        return self

    def stored_bytes(self) -> int:
        """Bytes from the first element to the last one."""
        if self.strides is None or not self.size:
            return self.nbytes
        strides = self.strides
        return self.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True)))

    def check(self) -> None:
        """Raise FormatError unless every element lies inside the source; reads nothing."""
        self.source.check_range(self.offset, self.stored_bytes())

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        strides = self.strides or c_strides(self.shape)
        first = self.offset + self.dtype.itemsize * sum(b * s for b, s in zip(start, strides, strict=True))
        return Stored(self.source, first, self.dtype, shape, strides)

    def every(self, axis: int, step: int) -> LazyTensor:
        strides = [*(self.strides or c_strides(self.shape))]
        strides[axis] *= step
        shape = [*self.shape]
        shape[axis] = -(-shape[axis] // step)
        return Stored(self.source, self.offset, self.dtype, tuple(shape), tuple(strides))

    def _reshape(self, shape: Shape) -> LazyTensor:
        strides = None if self.strides is None else reshaped_strides(self.shape, self.strides, shape)
        if self.strides is not None and strides is None:
            return Reshaped(self, shape)
        return Stored(self.source, self.offset, self.dtype, shape, strides)

    def _permute(self, axes: Shape) -> LazyTensor:
        strides = self.strides or c_strides(self.shape)
        order = tuple(strides[a] for a in axes)
        return Stored(self.source, self.offset, self.dtype, tuple(self.shape[a] for a in axes), order)


class Constant(LazyTensor):
    """One element repeated; zero if ``element`` (its little-endian bytes) is None."""

    __slots__ = ("element",)

    def __init__(self, dtype: DType, shape: Shape, element: bytes | None = None) -> None:
        self.dtype = dtype
        self.shape = shape
        self.element = bytes(dtype.itemsize) if element is None else element

    def identity(self) -> Identity:
        return self.dtype, self.shape, self.element

    def read_box(self, start: Shape, out: Array) -> None:
        out[...] = np.frombuffer(self.element, dtype=out.dtype)[0]

    def pieces(self) -> Iterator[Stored]:
        return iter(())

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return Constant(self.dtype, shape, self.element)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return Constant(self.dtype, shape, self.element)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Constant(self.dtype, tuple(self.shape[a] for a in axes), self.element)


class Mosaic(LazyTensor):
    """Boxes laid side by side: joined shards, a padded vocabulary, an interleaved QKV.

    Args:
        dtype: element type of every piece.
        shape: the whole.
        starts: index of the first element of each piece, ``[pieces, axes]``.
        stops: index past the last one, same shape.
        tiles: the pieces; any sequence, so that a checkpoint of a million chunks can make them when asked.
    """

    __slots__ = ("starts", "stops", "tiles")

    def __init__(self, dtype: DType, shape: Shape, starts: Array, stops: Array, tiles: Sequence[LazyTensor]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.starts = starts
        self.stops = stops
        self.tiles = tiles

    def identity(self) -> Identity:
        return self.dtype, self.shape, self.starts, self.stops, self.tiles

    def _overlaps(self, start: Shape, shape: Shape) -> Iterator[tuple[int, list[int], list[int]]]:
        """Number, first index and index past the last of each piece's part inside a box, in the whole's indices."""
        end = tuple(b + n for b, n in zip(start, shape, strict=True))
        hit = ((self.starts < end) & (self.stops > start)).all(axis=1)
        for number in np.flatnonzero(hit):
            low = np.maximum(self.starts[number], start)
            high = np.minimum(self.stops[number], end)
            yield int(number), low.tolist(), high.tolist()

    def read_box(self, start: Shape, out: Array) -> None:
        for number, low, high in self._overlaps(start, out.shape):
            inside = tuple(a - int(b) for a, b in zip(low, self.starts[number], strict=True))
            where: tuple[Any, ...] = tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))
            self.tiles[number].read_box(inside, out[where + (Ellipsis,)])  # noqa: RUF005 (see gather)

    def pieces(self) -> Iterator[Stored]:
        for tile in self.tiles:
            yield from tile.pieces()

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        end = tuple(b + n for b, n in zip(start, shape, strict=True))
        hit = np.flatnonzero(((self.starts < end) & (self.stops > start)).all(axis=1))
        low_corners, high_corners = self.starts[hit], self.stops[hit]
        if len(hit) > 1 and (low_corners >= start).all() and (high_corners <= end).all():
            some = _Some(self.tiles, hit)
            return Mosaic(self.dtype, shape, low_corners - start, high_corners - start, some)
        tiles, starts, stops = [], [], []
        for number, low, high in self._overlaps(start, shape):
            inside = tuple(a - int(b) for a, b in zip(low, self.starts[number], strict=True))
            extent = tuple(c - a for a, c in zip(low, high, strict=True))
            tiles.append(self.tiles[number].box(inside, extent))
            starts.append([a - b for a, b in zip(low, start, strict=True)])
            stops.append([c - b for b, c in zip(start, high, strict=True)])
        return _mosaic(self.dtype, shape, starts, stops, tiles)

    def _reshape(self, shape: Shape) -> LazyTensor:
        moved = moved_unit_axes(self.shape, shape)
        if moved is None or len(self.tiles) > _PUSH_LIMIT:
            return Reshaped(self, shape)
        starts = with_axes(self.starts, moved, 0)
        stops = with_axes(self.stops, moved, 1)
        tiles = [tile.reshape(tuple(int(n) for n in stops[i] - starts[i])) for i, tile in enumerate(self.tiles)]
        return Mosaic(self.dtype, shape, starts, stops, tiles)

    def _permute(self, axes: Shape) -> LazyTensor:
        if len(self.tiles) > _PUSH_LIMIT:
            return Permuted(self, axes)
        shape = tuple(self.shape[a] for a in axes)
        order = list(axes)
        tiles = [tile.permute(axes) for tile in self.tiles]
        return Mosaic(self.dtype, shape, self.starts[:, order], self.stops[:, order], tiles)


_PUSH_LIMIT = 4096


class _Some(Sequence[LazyTensor]):
    """Some of a sequence of pieces, still made only when asked for."""

    def __init__(self, pieces: Sequence[LazyTensor], numbers: Array) -> None:
        self._pieces: Sequence[LazyTensor] = pieces._pieces if isinstance(pieces, _Some) else pieces
        self._numbers: Array = pieces._numbers[numbers] if isinstance(pieces, _Some) else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def identity(self) -> Identity:
        return self._pieces, self._numbers

    @overload
    def __getitem__(self, index: int) -> LazyTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LazyTensor]: ...
    def __getitem__(self, index: int | slice) -> LazyTensor | Sequence[LazyTensor]:
        if isinstance(index, slice):
            return _Some(self._pieces, self._numbers[index])
        return self._pieces[int(self._numbers[index])]


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
        if out.size * widest > _COMPUTED_BYTES and out.ndim:
            axis = next(a for a, n in enumerate(out.shape) if n > 1)
            step = max(1, out.shape[axis] * _COMPUTED_BYTES // (out.size * widest))
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


# -- making tensors ------------------------------------------------------------------------------------------


def from_array(array: Array) -> Stored:
    """A tensor of the elements of an array, which must not change afterwards.

    Up to 4 KiB are copied; a larger array is referred to and is live state, which has no identity.
    """
    kind = from_numpy(array.dtype)
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    data = contiguous.tobytes() if array.nbytes <= _COPIED_BYTES else contiguous.view(kind.raw)
    return Stored(MemorySource(data), 0, kind, tuple(array.shape))


def concatenate(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Tensors one after another along ``axis``.

    Raises:
        UsageError: dtypes differ, shapes differ off the axis, or there is no such axis.
    """
    first = tensors[0]
    starts, stops, at = [], [], 0
    for tensor in tensors:
        same = tensor.shape[:axis] + tensor.shape[axis + 1 :] == first.shape[:axis] + first.shape[axis + 1 :]
        if tensor.dtype != first.dtype or not same or axis >= tensor.ndim:
            raise UsageError(
                f"cannot be joined along axis {axis}",
                expected=f"{first.dtype.name} {first.shape}",
                found=f"{tensor.dtype.name} {tensor.shape}",
            )
        begin, end = [0] * first.ndim, [*tensor.shape]
        begin[axis], end[axis] = at, at + tensor.shape[axis]
        at = end[axis]
        starts.append(begin)
        stops.append(end)
    shape = (*first.shape[:axis], at, *first.shape[axis + 1 :])
    return _mosaic(first.dtype, shape, starts, stops, list(tensors))


def stack(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Tensors of one shape along a new axis."""
    return concatenate([t.reshape((*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors], axis)


def mosaic(dtype: DType, shape: Shape, starts: Sequence[Sequence[int]], tiles: Sequence[LazyTensor]) -> LazyTensor:
    """Boxes laid side by side at ``starts``, which must cover ``shape`` exactly once.

    Raises:
        AnyckptError: a piece of another dtype, a piece outside, an overlap or a gap.
    """
    stops = [[b + n for b, n in zip(start, tile.shape, strict=True)] for start, tile in zip(starts, tiles, strict=True)]
    check_cover(shape, _corners(starts, len(shape)), _corners(stops, len(shape)))
    for tile in tiles:
        if tile.dtype != dtype:
            raise AnyckptError("a piece has another element type", expected=dtype.name, found=tile.dtype.name)
    return _mosaic(dtype, shape, starts, stops, tiles)


def held(tensors: Iterable[LazyTensor]) -> AbstractContextManager[None]:
    """Within, the elements of far tensors are held, asked for at once; they must be few."""
    return holding(span for tensor in tensors if tensor.is_far for span in tensor.needed(0, tensor.size))


def as_numbers(raw: Array, kind: DType) -> Array:
    """An array of raw elements seen as numbers, or as it is where numpy has no such numbers."""
    return raw if kind.numpy is None else raw.view(kind.numpy)


def _corners(values: Sequence[Sequence[int]], ndim: int) -> Array:
    return np.array(values, dtype=np.int64).reshape(len(values), ndim)


def _mosaic(
    dtype: DType,
    shape: Shape,
    starts: Sequence[Sequence[int]],
    stops: Sequence[Sequence[int]],
    tiles: Sequence[LazyTensor],
) -> LazyTensor:
    full = [i for i, tile in enumerate(tiles) if tile.size]
    if len(full) < len(tiles):
        starts, stops = [starts[i] for i in full], [stops[i] for i in full]
        tiles = [tiles[i] for i in full]
    if len(tiles) == 1 and tiles[0].shape == shape:
        return tiles[0]
    if not tiles:
        return Constant(dtype, shape)
    return Mosaic(dtype, shape, _corners(starts, len(shape)), _corners(stops, len(shape)), tiles)


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
