"""Lazy tensors of integer codes in words: codes minus a zero point, times a scale that any column may choose."""

from __future__ import annotations

import math
import threading

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import MappingError
from anyckpt.identity import ElementWise, Identity
from anyckpt.indexing import Array, Shape, in_cache
from anyckpt.storage.gather import hole, is_hole, scratch
from anyckpt.tensor import LazyTensor, View
from anyckpt.tensor.views import ElementWiseInto

_BYTE = dtype("uint8")


class Unpacked(View):
    """The codes of words that hold several neighbours along an axis; one code a byte, as it is stored.

    Args:
        child: int32, or uint8.
        axis: along which there are more codes than words.
        bits: of a code, which divide 32.
        order: for each code of a word, which of the word's fields it is, counted from the least bits; in turn if None.
    """

    __slots__ = ("axis", "bits", "order")

    def __init__(self, child: LazyTensor, axis: int, bits: int, order: tuple[int, ...] | None = None) -> None:
        self.child = child
        self.axis = axis
        self.bits = bits
        self.order = tuple(range(32 // bits)) if order is None else order
        self.dtype = _BYTE
        self.shape = (*child.shape[:axis], len(self.order) * child.shape[axis], *child.shape[axis + 1 :])

    def identity(self) -> Identity:
        return self.child, self.axis, self.bits, self.order

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        axis, each = self.axis, len(self.order)
        low, high = start[axis], start[axis] + out.shape[axis]
        first, last = low // each, -(-high // each)
        shape = (*out.shape[:axis], last - first, *out.shape[axis + 1 :])
        corner = (*start[:axis], first, *start[axis + 1 :])
        if is_hole(out):
            self.child.read_box(corner, hole(shape, self.child.dtype.raw))
            return
        with scratch(self.child.dtype.itemsize * math.prod(shape)) as buffer:
            words = buffer.view(self.child.dtype.raw).reshape(shape)
            self.child.read_box(corner, words)
            packed = np.moveaxis(words, axis, -1)
            target = np.moveaxis(out, axis, -1)
            for number, place in enumerate(self.order):
                begin = (number - low) % each
                some = target[..., begin::each]
                skipped = (low + begin) // each - first
                part = packed[..., skipped : skipped + some.shape[-1]]
                np.copyto(some, (part >> place * self.bits) & ((1 << self.bits) - 1), casting="unsafe")

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        axis, each = self.axis, len(self.order)
        if start[axis] % each or shape[axis] % each:
            return super()._box(start, shape)
        words = [(*edge[:axis], edge[axis] // each, *edge[axis + 1 :]) for edge in (start, shape)]
        return Unpacked(self.child.box(*words), axis, self.bits, self.order)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Unpacked(self.child.permute(axes), axes.index(self.axis), self.bits, self.order)


class RunningBits(View):
    """The codes of bytes in which they follow one another bit by bit, the least bits first; one code a byte.

    Args:
        child: uint8, ``[..., bytes]``; a row's codes fill its bytes.
        bits: of a code, fewer than 8: eight codes lie in so many bytes.
    """

    __slots__ = ("bits",)

    def __init__(self, child: LazyTensor, bits: int) -> None:
        self.child = child
        self.bits = bits
        self.dtype = _BYTE
        self.shape = (*child.shape[:-1], child.shape[-1] * 8 // bits)

    def identity(self) -> Identity:
        return self.child, self.bits

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        low, high = start[-1], start[-1] + out.shape[-1]
        first, last = low // 8, -(-high // 8)
        shape = (*out.shape[:-1], (last - first) * self.bits)
        corner = (*start[:-1], first * self.bits)
        if is_hole(out):
            self.child.read_box(corner, hole(shape, self.child.dtype.raw))
            return
        with scratch(math.prod(shape)) as buffer:
            stored = buffer.reshape(shape)
            self.child.read_box(corner, stored)
            for number in range(8):
                begin = (number - low) % 8
                some = out[..., begin::8]
                if not some.size:
                    continue
                skipped = (low + begin) // 8 - first
                at, shift = divmod(number * self.bits, 8)
                part = stored[..., skipped * self.bits + at :: self.bits][..., : some.shape[-1]] >> shift
                if shift + self.bits > 8:
                    rest = stored[..., skipped * self.bits + at + 1 :: self.bits][..., : some.shape[-1]]
                    part |= rest << 8 - shift
                np.bitwise_and(part, (1 << self.bits) - 1, out=some)

    def _permute(self, axes: Shape) -> LazyTensor:
        if axes[-1] == len(axes) - 1:
            return RunningBits(self.child.permute(axes), self.bits)
        return super()._permute(axes)


class Columns:
    """Which column of a tensor each column of another takes; the numbers are read when they are first needed.

    Args:
        numbers: whole numbers, one for each column.
        count: how many columns there are to choose from.
    """

    def __init__(self, numbers: LazyTensor, count: int) -> None:
        self.numbers = numbers
        self.count = count
        self._found: Array | None = None
        self._once = threading.Lock()

    def identity(self) -> Identity:
        return self.numbers, self.count

    def __reduce__(self) -> tuple[type[Columns], tuple[LazyTensor, int]]:
        return Columns, (self.numbers, self.count)

    def value(self) -> Array:
        """The numbers.

        Raises:
            MappingError: one is not of a column.
        """
        with self._once:
            if self._found is None:
                found = self.numbers.numpy().astype(np.intp)
                if found.size and not 0 <= found.min() <= found.max() < self.count:
                    raise MappingError(
                        "columns are of groups that do not exist",
                        expected=f"0 to {self.count - 1}",
                        found=f"{found.min()} to {found.max()}",
                        remedy="copy the weight files again from the model's origin",
                    )
                self._found = found
            return self._found


class Gathered(View):
    """A matrix whose every column is one of another's.

    Args:
        child: ``[rows, groups]``.
        columns: for each column, which of the child's it is.
        width: how many there are.
    """

    __slots__ = ("columns",)

    def __init__(self, child: LazyTensor, columns: Columns, width: int) -> None:
        self.child = child
        self.columns = columns
        self.dtype = child.dtype
        self.shape = (child.shape[0], width)

    def identity(self) -> Identity:
        return self.child, self.columns, self.shape

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        shape = (out.shape[0], self.child.shape[1])
        if is_hole(out):
            self.child.read_box((start[0], 0), hole(shape, self.dtype.raw))
            return
        groups = np.empty(shape, self.dtype.raw)
        self.child.read_box((start[0], 0), groups)
        wanted = self.columns.value()[start[1] : start[1] + out.shape[1]]
        out[...] = groups[:, wanted]


@dataclass(frozen=True)
class Affine(ElementWiseInto):
    """A code minus its zero point, times its scale, computed in float32 and rounded to ``to``."""

    to: DType

    def into(self, out: Array, codes: Array, zeros: Array, scales: Array) -> None:
        for number, some, zero, scale in in_cache(out, codes, zeros, scales):
            with scratch(4 * some.size) as buffer, np.errstate(over="ignore", invalid="ignore"):
                numbers = buffer.view(np.float32).reshape(some.shape)
                np.subtract(some, zero, out=numbers, dtype=np.float32)
                np.multiply(numbers, scale, out=numbers, dtype=np.float32)
                np.copyto(number, numbers, casting="unsafe")


@dataclass(frozen=True)
class Offset(ElementWiseInto):
    """A code times its scale, plus a number: each rounded to ``numbers``, and the sum to ``to``, as MLX computes it."""

    numbers: DType
    to: DType

    def into(self, out: Array, codes: Array, scales: Array, offsets: Array) -> None:
        kind = self.numbers.numpy
        for number, some, scale, offset in in_cache(out, codes, scales, offsets):
            with np.errstate(over="ignore", invalid="ignore"):
                share = np.multiply(some, scale, dtype=np.float32).astype(kind)
                total = np.add(share, offset, dtype=np.float32).astype(kind)
                np.copyto(number, total, casting="unsafe")


@dataclass(frozen=True)
class Raised(ElementWise):
    """Words plus a number, as unsigned integers that begin again at zero."""

    by: int

    def __call__(self, words: Array) -> Array:
        raised: Array = (words.view(np.uint32) + np.uint32(self.by)).view(words.dtype)
        return raised


@dataclass(frozen=True)
class Shares(ElementWiseInto):
    """A code times its scale times a step, in float32 and in this order, rounded to ``to``."""

    to: DType
    step: float

    def into(self, out: Array, codes: Array, scales: Array) -> None:
        for number, some, scale in in_cache(out, codes, scales):
            with scratch(4 * some.size) as buffer, np.errstate(over="ignore", invalid="ignore"):
                numbers = buffer.view(np.float32).reshape(some.shape)
                np.multiply(some, scale, out=numbers, dtype=np.float32)
                np.multiply(numbers, np.float32(self.step), out=numbers)
                np.copyto(number, numbers, casting="unsafe")


@dataclass(frozen=True, eq=False)
class OfTable(ElementWise):
    """The number of a code in a small tensor, times one scale and plus another number, in float32.

    Attributes:
        table: a tensor of 256 or 16 float32, read when it is first needed.
        offset: a number that is added.
    """

    table: Numbers
    offset: float = 0.0

    def __call__(self, codes: Array, scales: Array) -> Array:
        found: Array = np.take(self.table.value(), codes, mode="clip") * scales.astype(np.float32)
        return found + np.float32(self.offset) if self.offset else found


class Numbers:
    """A small tensor of float32 that is read when it is first needed."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self._found: Array | None = None

    def identity(self) -> Identity:
        return (self.tensor,)

    def __reduce__(self) -> tuple[type[Numbers], tuple[LazyTensor]]:
        return Numbers, (self.tensor,)

    def value(self) -> Array:
        """The numbers."""
        if self._found is None:
            self._found = self.tensor.numpy().astype(np.float32).reshape(-1)
        return self._found
