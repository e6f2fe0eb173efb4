"""Lazy tensors of quantized weights: two codes in a byte, a scale for each block, and the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.identity import ElementWise, Identity
from anyckpt.indexing import Array, Shape, in_cache, look_up
from anyckpt.quantization.numbers import values_of
from anyckpt.quantization.pairs import look_up_pairs
from anyckpt.storage.gather import hole, is_hole, scratch
from anyckpt.tensor import Boxed, LazyTensor, Mapped, Stored, View
from anyckpt.tensor.views import ElementWiseInto

_BYTE, _FLOAT32 = dtype("uint8"), dtype("float32")

_BLOCKS = (8, 16, 32, 64, 128)

_WORTH_A_TABLE = 1 << 17  # elements, which take about as long as making a table


class Halved(View):
    """The 4-bit codes of bytes that hold two neighbours along an axis, the first in the low half; one code a byte.

    Args:
        child: uint8.
        axis: along which there are twice as many codes as bytes.
    """

    __slots__ = ("axis",)

    def __init__(self, child: LazyTensor, axis: int) -> None:
        self.child = child
        self.axis = axis
        self.dtype = _BYTE
        self.shape = (*child.shape[:axis], 2 * child.shape[axis], *child.shape[axis + 1 :])

    def identity(self) -> Identity:
        return self.child, self.axis

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        axis, low, high = self.axis, start[self.axis], start[self.axis] + out.shape[self.axis]
        first, last = low // 2, -(-high // 2)
        shape = (*out.shape[:axis], last - first, *out.shape[axis + 1 :])
        if is_hole(out):
            self.child.read_box((*start[:axis], first, *start[axis + 1 :]), hole(shape, self.child.dtype.raw))
            return
        with scratch(math.prod(shape)) as buffer:
            pairs = buffer.reshape(shape)
            self.child.read_box((*start[:axis], first, *start[axis + 1 :]), pairs)
            codes, target = np.moveaxis(pairs, axis, -1), np.moveaxis(out, axis, -1)
            odd = low % 2  # the box begins with the second code of a byte
            even = target[..., odd::2]
            np.bitwise_and(codes[..., odd : odd + even.shape[-1]], 15, out=even)
            others = target[..., 1 - odd :: 2]
            np.right_shift(codes[..., : others.shape[-1]], 4, out=others)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        axis = self.axis
        if start[axis] % 2 or shape[axis] % 2:
            return Boxed(self, start, shape)
        halves = [(*edge[:axis], edge[axis] // 2, *edge[axis + 1 :]) for edge in (start, shape)]
        return Halved(self.child.box(*halves), axis)

    def _reshape(self, shape: Shape) -> LazyTensor:
        if self.axis == self.ndim - 1 and shape and shape[-1] == self.shape[-1]:
            return Halved(self.child.reshape((*shape[:-1], shape[-1] // 2)), len(shape) - 1)
        return super()._reshape(shape)

    def _permute(self, axes: Shape) -> LazyTensor:
        return Halved(self.child.permute(axes), axes.index(self.axis))


class Repeated(View):
    """A tensor whose every element stands for a block of elements, the last block along an axis perhaps cut short.

    Args:
        child: one element per block.
        block: elements of a block along each axis.
        shape: of the whole, from the index ``start`` of the first block's first element on.
        start: how many elements of the first block along each axis are left out.
    """

    __slots__ = ("block", "start")

    def __init__(self, child: LazyTensor, block: Shape, shape: Shape, start: Shape | None = None) -> None:
        self.child = child
        self.block = block
        self.shape = shape
        self.start = (0,) * len(shape) if start is None else start
        self.dtype = child.dtype

    def identity(self) -> Identity:
        return self.child, self.block, self.shape, self.start

    def read_box(self, start: Shape, out: Array) -> None:
        if not out.size:
            return
        begin = [a + b for a, b in zip(self.start, start, strict=True)]
        end = [a + n for a, n in zip(begin, out.shape, strict=True)]
        first = tuple(a // size for a, size in zip(begin, self.block, strict=True))
        last = tuple(-(-b // size) for b, size in zip(end, self.block, strict=True))
        shape = tuple(b - a for a, b in zip(first, last, strict=True))
        if is_hole(out):
            self.child.read_box(first, hole(shape, self.dtype.raw))
            return
        small = np.empty(shape, self.dtype.raw)
        self.child.read_box(first, small)
        spread = [axis for axis, n in enumerate(small.shape) if n > 1 and self.block[axis] > 1]
        rows = spread.pop(0) if len(spread) > 1 else None  # copied block by block: rows repeated would be the whole
        for axis in spread:
            small = np.repeat(small, self.block[axis], axis=axis)
            skipped = begin[axis] - first[axis] * self.block[axis]
            small = small[(slice(None),) * axis + (slice(skipped, skipped + out.shape[axis]),)]
        if rows is None:
            out[...] = small
            return
        size = self.block[rows]
        for number in range(first[rows], last[rows]):
            low, high = max(number * size, begin[rows]) - begin[rows], min((number + 1) * size, end[rows]) - begin[rows]
            where = (slice(None),) * rows
            at = number - first[rows]
            np.copyto(out[where + (slice(low, high),)], small[where + (slice(at, at + 1),)])  # noqa: RUF005 (see gather)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        begin = tuple(a + b for a, b in zip(self.start, start, strict=True))
        first = tuple(a // size for a, size in zip(begin, self.block, strict=True))
        last = tuple(-(-(a + n) // size) for a, n, size in zip(begin, shape, self.block, strict=True))
        if any(b <= a for a, b in zip(first, last, strict=True)):
            return Boxed(self, start, shape)
        child = self.child.box(first, tuple(b - a for a, b in zip(first, last, strict=True)))
        return Repeated(child, self.block, shape, tuple(a % size for a, size in zip(begin, self.block, strict=True)))

    def _permute(self, axes: Shape) -> LazyTensor:
        block, shape, start = (tuple(values[a] for a in axes) for values in (self.block, self.shape, self.start))
        return Repeated(self.child.permute(axes), block, shape, start)


def scaled(codes: LazyTensor, table: Array, scales: LazyTensor, block: Shape, to: DType) -> LazyTensor:
    """Codes times the scale of their block, computed in float32 and rounded to nearest, ties to even.

    Args:
        codes: one in a byte, of any 8-bit type.
        table: the number of each code, float32.
        scales: a float, or e8m0 exponents (``float8_e8m0fnu`` or ``uint8``); one per block, on as many axes.
        block: elements of a block along each axis.
        to: bfloat16, float16 or float32.
    """
    narrow = scales.dtype.itemsize == 1
    repeated = Repeated(scales if narrow else numbers_of(scales), block, codes.shape)
    function = Product(table, to, scales.dtype) if narrow else Multiply(table, to)
    if isinstance(codes, Halved) and table.size == 16 and _go_in_pairs(codes, scales, block):
        return Paired((codes, repeated), function, codes.child, scales, block[-1])
    return Mapped((codes, repeated), to, function)


def _go_in_pairs(codes: Halved, scales: LazyTensor, block: Shape) -> bool:
    """Whether both codes of a byte, and all of a few words, have one scale that is told by a byte."""
    stored = scales.stored if isinstance(scales, CommonScale) else scales
    return (
        stored.dtype.itemsize == 1
        and codes.axis == codes.ndim - 1
        and block[-1] in _BLOCKS
        and codes.shape[-1] % block[-1] == 0
        and stored.shape == (*codes.shape[:-1], codes.shape[-1] // block[-1])
        and codes.size >= _WORTH_A_TABLE
    )


def as_bytes(tensor: LazyTensor) -> LazyTensor | None:
    """The bytes of a tensor's elements as a longer last axis; None if they do not lie together in C order."""
    if not isinstance(tensor, Stored) or tensor.strides is not None or not tensor.ndim:
        return None
    shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.dtype.itemsize)
    return Stored(tensor.source, tensor.offset, _BYTE, shape)


def product(scales: LazyTensor, common: LazyTensor) -> LazyTensor:
    """Scales times one number (a tensor of one element), or one for each along the first axis, in float32."""
    return _put_to(scales, common, np.multiply)


def quotient(scales: LazyTensor, common: LazyTensor) -> LazyTensor:
    """Scales over one number (a tensor of one element), in float32."""
    return _put_to(scales, common, np.divide)


def _put_to(scales: LazyTensor, common: LazyTensor, function: Callable[[Array, Array], Array]) -> LazyTensor:
    if scales.dtype.itemsize == 1 and common.size == 1:
        return CommonScale(scales, common, function)
    return Mapped((numbers_of(scales), _everywhere(common, scales.shape)), _FLOAT32, function)


def _everywhere(number: LazyTensor, shape: Shape) -> LazyTensor:
    each = number.size if number.ndim else 1
    block = shape if each == 1 else (1, *shape[1:])
    return Repeated(numbers_of(number).reshape((each, *(1 for _ in shape[1:]))), block, shape)


def numbers_of(scales: LazyTensor) -> LazyTensor:
    """Scales of any type in float32."""
    return scales if scales.dtype == _FLOAT32 else Mapped((scales,), _FLOAT32, Decode(scales.dtype))


@dataclass(frozen=True)
class Decode(ElementWise):
    """Scales of any type, e8m0 exponents included, as float32."""

    kind: DType

    def __call__(self, array: Array) -> Array:
        wide = self.kind.itemsize > 1
        decoded: Array = array.astype(np.float32) if wide else np.take(values_of(self.kind), array.view("u1"))
        return decoded


@dataclass(frozen=True, eq=False)  # arrays cannot be compared as a whole
class Multiply(ElementWiseInto):
    """The number of each code in ``table`` (float32) times a scale, rounded to ``to``."""

    table: Array
    to: DType

    def into(self, out: Array, codes: Array, scales: Array) -> None:
        for number, some, several in in_cache(out, codes.view("u1"), scales):
            with scratch(4 * some.size) as buffer, np.errstate(over="ignore", invalid="ignore"):
                numbers = buffer.view(np.float32).reshape(some.shape)
                look_up(self.table, some, numbers)
                np.multiply(numbers, several, out=numbers)
                np.copyto(number, numbers, casting="unsafe")


@dataclass(frozen=True, eq=False)
class Product(Multiply):
    """The same for scales of one byte: there are so few pairs of code and scale that each product is computed once."""

    kind: DType

    def into(self, out: Array, codes: Array, scales: Array) -> None:
        width = self.table.size
        products = _products(self.table.tobytes(), values_of(self.kind).tobytes(), self.to)
        for number, some, several in in_cache(out, codes.view("u1"), scales.view("u1")):
            with scratch(2 * some.size) as buffer:
                pairs = buffer.view("u2").reshape(some.shape)
                np.multiply(several, width, out=pairs, dtype=np.uint16)
                np.add(pairs, some, out=pairs)
                look_up(products, pairs, number)


@lru_cache(maxsize=32)
def _products(table: bytes, scales: bytes, to: DType) -> Array:
    """By scale and code, in one axis."""
    numbers, several = (np.frombuffer(each, np.float32) for each in (table, scales))
    codes = np.arange(numbers.size, dtype=np.uint8)
    return Multiply(numbers, to)(np.tile(codes, several.size), np.repeat(several, numbers.size))


class CommonScale(Mapped):
    """Scales of one byte, put to one number by a function, in float32.

    Attributes:
        stored: the scales.
        common: the number.
    """

    __slots__ = ("common", "stored")

    def __init__(self, stored: LazyTensor, common: LazyTensor, function: Callable[[Array, Array], Array]) -> None:
        super().__init__((numbers_of(stored), _everywhere(common, stored.shape)), _FLOAT32, function)
        self.stored = stored
        self.common = common

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return CommonScale(self.stored.box(start, shape), self.common, self.function)

    def _reshape(self, shape: Shape) -> LazyTensor:
        return CommonScale(self.stored.reshape(shape), self.common, self.function)

    def _permute(self, axes: Shape) -> LazyTensor:
        return CommonScale(self.stored.permute(axes), self.common, self.function)

    def of_each_byte(self) -> Array:
        """The scale that a byte comes to, ``[256]``.

        Raises:
            FormatError: bytes are missing from a file.
        """
        with np.errstate(all="ignore"):
            found: Array = self.function(values_of(self.stored.dtype), numbers_of(self.common).numpy().reshape(-1))
        return found


class Paired(Mapped):
    """Products of 4-bit codes along the last axis, two of a byte at a time: a table has those of each scale and byte.

    A box that begins or ends within a block is computed one by one, and so is one that is not written in C order.

    Args:
        operands: codes, and scales repeated.
        function: their product.
        packed: the bytes of the codes.
        scales: of one byte, or a ``CommonScale``; one for each ``block`` codes of a row.
        block: one of ``_BLOCKS``.
    """

    __slots__ = ("block", "packed", "scales")

    def __init__(
        self,
        operands: tuple[LazyTensor, LazyTensor],
        function: Multiply,
        packed: LazyTensor,
        scales: LazyTensor,
        block: int,
    ) -> None:
        super().__init__(operands, function.to, function)
        self.packed = packed
        self.scales = scales
        self.block = block

    def _compute(self, start: Shape, out: Array) -> None:
        if start[-1] % self.block or out.shape[-1] % self.block or not out.flags.c_contiguous:
            super()._compute(start, out)
            return
        stored = self.scales.stored if isinstance(self.scales, CommonScale) else self.scales
        with scratch(out.size // 2) as codes, scratch(out.size // self.block) as scales:
            self.packed.read_box((*start[:-1], start[-1] // 2), codes.reshape((*out.shape[:-1], out.shape[-1] // 2)))
            shape = (*out.shape[:-1], out.shape[-1] // self.block)
            stored.read_box((*start[:-1], start[-1] // self.block), scales.reshape(shape))
            look_up_pairs(self._table(), codes, scales, out.reshape(-1))

    def _table(self) -> Array:
        assert isinstance(self.function, Multiply)
        scales = self.scales.of_each_byte() if isinstance(self.scales, CommonScale) else values_of(self.scales.dtype)
        return _pairs(self.function.table.tobytes(), scales.tobytes(), self.dtype)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        if start[-1] % self.block or shape[-1] % self.block:
            return super()._box(start, shape)
        two, several = (
            tensor.box((*start[:-1], start[-1] // each), (*shape[:-1], shape[-1] // each))
            for tensor, each in ((self.packed, 2), (self.scales, self.block))
        )
        return self._alike(two, several)

    def _reshape(self, shape: Shape) -> LazyTensor:
        if not shape or shape[-1] != self.shape[-1]:
            return super()._reshape(shape)
        two, several = (
            tensor.reshape((*shape[:-1], shape[-1] // each))
            for tensor, each in ((self.packed, 2), (self.scales, self.block))
        )
        return self._alike(two, several)

    def _alike(self, packed: LazyTensor, scales: LazyTensor) -> LazyTensor:
        assert isinstance(self.function, Multiply)
        block = (*(1 for _ in packed.shape[1:]), self.block)
        return scaled(Halved(packed, packed.ndim - 1), self.function.table, scales, block, self.dtype)


@lru_cache(maxsize=8)
def _pairs(table: bytes, scales: bytes, to: DType) -> Array:
    """Both products of each byte of two codes, by scale and byte, ``[65536]`` unsigned integers of two elements."""
    products = _products(table, scales, to).reshape(256, 16)
    codes = np.arange(256)
    both = np.stack((products[:, codes & 15], products[:, codes >> 4]), axis=-1)
    return both.view(f"<u{2 * to.itemsize}").reshape(-1)
