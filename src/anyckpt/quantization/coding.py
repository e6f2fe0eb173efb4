"""Codes and scales of blocks: a block's scale is made of its largest magnitude, and its elements are divided by it."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from anyckpt.blockwise import BlockFunction, Output
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape, in_cache, look_up
from anyckpt.quantization.largest import TensorScale, check_finite, magnitudes
from anyckpt.quantization.numbers import values_of
from anyckpt.quantization.rounding import E4M3, FLOAT4, Numbers
from anyckpt.storage.gather import scratch
from anyckpt.tensor.views import ElementWiseInto

_FLOAT32, _BYTE, _E8M0 = dtype("float32"), dtype("uint8"), dtype("float8_e8m0fnu")
_TINY = np.finfo(np.float32).tiny
_PART_ELEMENTS = 1 << 18  # in which the few dozen calls that each part takes cost little
_SHORT_BLOCK = 64  # runs of fewer elements are reduced faster across than along

Packing = Literal["none", "rows", "unsigned rows", "columns", "words"]
"""How codes lie: one in a byte; those of two rows (int8, or uint8) or of two columns in one, the first in the low half;
eight (or four of 8 bits) neighbours of a row in an int32, from its least bits on, with the least number as 0."""


@dataclass(frozen=True)
class BlockCodes(BlockFunction):
    """Codes and scales of blocks of a matrix; axes before its last two are others beside it.

    Attributes:
        rows: of a block.
        columns: of a block, or None for whole rows.
        numbers: what codes are.
        packing: how they lie.
        kind: element type of the scales.
        name: the weight's, for messages, or None.
    """

    rows: int
    columns: int | None
    numbers: Numbers
    packing: Packing
    kind: DType
    name: str | None

    def block(self, shape: Shape) -> Shape:
        rows, columns = self._sizes(shape)
        return (*(1 for _ in shape[:-2]), math.lcm(rows, self._packed()[0]), columns)

    def outputs(self, shape: Shape) -> tuple[Output, ...]:
        ones = tuple(1 for _ in shape[:-2])
        kind = {"none": self.numbers.dtype, "rows": dtype("int8"), "words": dtype("int32")}
        return Output(kind.get(self.packing, _BYTE), (*ones, *self._packed())), Output(
            self.kind, (*ones, *self._sizes(shape))
        )

    def _sizes(self, shape: Shape) -> tuple[int, int]:
        return self.rows, max(1, shape[-1]) if self.columns is None else self.columns

    @property
    def codes_in_a_word(self) -> int:
        """How many neighbours of a row share an int32; 1 where codes do not lie so."""
        if self.packing != "words":
            return 1
        return 4 if self.numbers.largest > 7 else 8

    def _packed(self) -> tuple[int, int]:
        if self.packing == "words":
            return 1, self.codes_in_a_word
        return {"none": (1, 1), "columns": (1, 2)}.get(self.packing, (2, 1))

    def elements(self, values: Array) -> Array:
        """What is divided by the scales."""
        return values

    @abstractmethod
    def scales(self, largest: Array) -> tuple[Array, Array]:
        """Scales as they are stored, and what the elements are divided by (float32), of the largest magnitudes
        (float32); both of their shape."""

    def __call__(self, values: Array) -> tuple[Array, ...]:
        shape = values.shape
        rows, columns = self._sizes(shape)
        down, across = self._packed()
        kinds = self.outputs(shape)
        codes = np.empty((*shape[:-2], -(-shape[-2] // down), -(-shape[-1] // across)), kinds[0].dtype.raw)
        scales = np.empty((*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)), self.kind.raw)
        if not values.size:
            return codes, scales
        width = max(1, _PART_ELEMENTS // (math.lcm(rows, down) * columns)) * columns
        height = max(1, _PART_ELEMENTS // (min(width, shape[-1]) * math.lcm(rows, down))) * math.lcm(rows, down)
        for place in np.ndindex(shape[:-2]):
            for top in range(0, shape[-2], height):
                for left in range(0, shape[-1], width):
                    part = values[place][top : top + height, left : left + width]
                    of_codes = codes[place][top // down : (top + height) // down, left // across :]
                    of_scales = scales[place][top // rows : (top + height) // rows, left // columns :]
                    self._part(part, of_codes, of_scales, rows, columns)
        return codes, scales

    def _part(self, values: Array, codes: Array, scales: Array, rows: int, columns: int) -> None:
        """Fill the beginnings of ``codes`` and ``scales`` with those of blocks, of which the last ones may be short."""
        height, width = values.shape
        padded = (-(-height // rows) * rows, -(-width // columns) * columns)
        with scratch(4 * math.prod(padded)) as buffer, scratch(math.prod(padded)) as bytes_:
            largest = _largest_of_blocks(values, rows, columns)
            check_finite(largest, self.name)
            stored, divisors = self.scales(largest)
            scales[: stored.shape[0], : stored.shape[1]] = stored.view(self.kind.raw)
            numbers = buffer.view(np.float32).reshape(padded)
            if padded != values.shape:
                numbers[...] = 0
            np.copyto(numbers[:height, :width], self.elements(values), casting="same_kind")
            blocks = numbers.reshape(padded[0] // rows, rows, padded[1] // columns, columns)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                np.divide(blocks, divisors[:, None, :, None], out=blocks)
            found = bytes_.reshape(padded)
            self.numbers.encode(numbers, found)
            self._pack(found[:height, :width], codes)

    def _pack(self, found: Array, codes: Array) -> None:
        if self.packing == "none":
            codes[: found.shape[0], : found.shape[1]] = found
        elif self.packing in ("rows", "unsigned rows"):
            np.bitwise_and(found, 15, out=found)
            out = codes[: found.shape[0] // 2, : found.shape[1]]
            np.left_shift(found[1::2], 4, out=out)
            np.bitwise_or(out, found[::2], out=out)
        elif self.packing == "columns":
            _halve(found, codes[: found.shape[0], : found.shape[1] // 2])
        else:
            self._pack_words(found, codes)

    def _pack_words(self, found: Array, codes: Array) -> None:
        bits = 8 if self.numbers.largest > 7 else 4
        np.add(found, 1 << bits - 1, out=found)
        if bits == 4:
            np.bitwise_and(found, 15, out=found)
        each = 8 // bits
        width = -(-found.shape[1] // (4 * each))
        out = codes[: found.shape[0], :width].view(np.uint8)  # its last axis is whole: words of whole rows
        if found.shape[1] % (4 * each):
            out[...] = 0
        if each == 1:
            out[:, : found.shape[1]] = found
            return
        if found.shape[1] % 2:
            found = np.pad(found, ((0, 0), (0, 1)))
        _halve(found, out[:, : found.shape[1] // 2])


def _halve(codes: Array, out: Array) -> None:
    """Put two neighbours, each in the lower half of a byte, into one byte, the first in its lower half.

    ``codes`` lie in C order, an even number in a row, and are overwritten.
    """
    pairs = codes.view(np.uint16)  # the first is the lower byte
    np.bitwise_or(pairs, pairs >> 4, out=pairs)
    np.copyto(out, pairs, casting="unsafe")


@dataclass(frozen=True)
class Scaled(BlockCodes):
    """A scale is the largest magnitude over a number; that of a block of zeros is 1.

    One that is too small for its element type is the least that the type has, so that nothing is divided by zero; one
    with which the outermost code would be infinite in that type is the largest with which it is not.

    Attributes:
        over: what the largest magnitude is divided by; the largest number of the codes, or a little more.
        first: a type to which elements are rounded before they are divided; scales are made of them as they are.
    """

    over: float
    first: DType | None = None

    def scales(self, largest: Array) -> tuple[Array, Array]:
        some = np.maximum(largest, _TINY)
        found = np.where(largest > 0, some / np.float32(self.over), np.float32(1))
        np.minimum(found, _largest_scale(self.kind, round(self.over)), out=found)
        if self.kind == "float32":
            return found, found
        with np.errstate(over="ignore"):
            stored = found.astype(self.kind.numpy)
        least = np.array(1, self.kind.raw).view(stored.dtype)
        stored = np.where(stored > 0, stored, least)
        return stored, stored.astype(np.float32)

    def elements(self, values: Array) -> Array:
        return values if self.first is None else values.astype(self.first.numpy)


@lru_cache(maxsize=32)
def _largest_scale(kind: DType, reach: int) -> Any:
    """The largest scale of an element type that times ``reach`` is a finite number of it, as float32."""

    def fits(scale: Any) -> bool:
        return bool(np.isfinite((scale.astype(np.float32) * np.float32(reach)).astype(kind.numpy)))

    with np.errstate(over="ignore"):
        scale = (np.array([_largest_number(kind)]) / reach).astype(kind.numpy)
        bits = scale.view(kind.raw)
        while not fits(scale):
            bits -= 1
        while fits((bits + 1).astype(kind.raw).view(scale.dtype)):
            bits += 1
    return scale.astype(np.float32)[0]


def _largest_number(kind: DType) -> float:
    """The largest finite number of a type of floats that has infinity."""
    infinity = np.array([np.inf], kind.numpy)
    return float((infinity.view(kind.raw) - 1).astype(kind.raw).view(infinity.dtype)[0])


@dataclass(frozen=True)
class PowersOfTwo(BlockCodes):
    """MXFP4: a scale is a power of two, chosen so that the largest magnitude is at most 7, which is rounded to 6.

    As compressed-tensors 0.20 chooses it (``generate_mx_scales``), but that 6 times a scale is never infinite in
    float32 and bfloat16: from 1.75 times the largest power of two on, numbers become 1.5 times that one.
    """

    _HALF: ClassVar[int] = 1 << 21  # of the last of the one bit that e2m1 has after the point
    _MOST: ClassVar[int] = 252  # 2 ** 125

    def scales(self, largest: Array) -> tuple[Array, Array]:
        exponents = ((largest.view(np.uint32) + np.uint32(self._HALF)) >> np.uint32(23)).astype(np.int32) - 2
        stored = np.clip(exponents, 0, self._MOST).astype(np.uint8)
        return stored, values_of(_E8M0)[stored]


@dataclass(frozen=True)
class NvFp4(BlockCodes):
    """NVFP4: a scale is an 8-bit float times the scale of the whole tensor.

    Attributes:
        common: the scale of the tensor, as ModelOpt states it or inverted, as compressed-tensors does.
    """

    common: TensorScale

    def scales(self, largest: Array) -> tuple[Array, Array]:
        common, six = self.common.value(), np.float32(FLOAT4.largest)
        found = largest / six * common if self.common.inverted else largest / (six * common)
        found[found == 0] = 1
        stored = np.empty(found.shape, np.uint8)
        E4M3.encode(found, stored)
        numbers = np.take(values_of(E4M3.dtype), stored)
        return stored, numbers / common if self.common.inverted else numbers * common


class TensorCodes(ElementWiseInto):
    """Codes with one scale for the whole tensor.

    Args:
        scale: the tensor's.
        numbers: what codes are.
        rounded: a type to which elements divided by the scale are rounded first; None for float32.
    """

    def __init__(self, scale: TensorScale, numbers: Numbers, rounded: DType | None = None) -> None:
        self.scale = scale
        self.numbers = numbers
        self.to = numbers.dtype
        self.rounded = rounded
        self._made = threading.Lock()
        self._table: Array | None = None

    def identity(self) -> Identity:
        return self.scale, self.numbers, self.rounded

    def __reduce__(self) -> tuple[type[TensorCodes], tuple[TensorScale, Numbers, DType | None]]:
        return TensorCodes, (self.scale, self.numbers, self.rounded)

    def into(self, out: Array, values: Array) -> None:
        if values.dtype.itemsize == 2:
            table = self._of_all(values.dtype)
            for codes, some in in_cache(out.view(np.uint8), values.view(np.uint16)):
                look_up(table, some, codes)
            return
        for codes, some in in_cache(out.view(np.uint8), values):
            self._encode(some, codes)

    def _encode(self, values: Array, codes: Array) -> None:
        with scratch(4 * values.size) as buffer:
            numbers = buffer.view(np.float32).reshape(values.shape)
            with np.errstate(over="ignore", invalid="ignore"):
                np.divide(values, self.scale.value(), out=numbers, dtype=np.float32, casting="same_kind")
                if self.rounded is not None:
                    numbers[...] = numbers.astype(self.rounded.numpy)
            self.numbers.encode(numbers, codes)

    def _of_all(self, kind: np.dtype[np.generic]) -> Array:
        """The code of every number of a 16-bit type, ``[65536]``."""
        with self._made:
            if self._table is None:
                every = np.arange(1 << 16, dtype=np.uint16).view(kind).astype(np.float32)
                table = np.empty(every.size, np.uint8)
                self._encode(every, table)
                self._table = table
            return self._table


def _largest_of_blocks(values: Array, rows: int, columns: int) -> Array:
    """The largest magnitude in each block, float32 ``[block rows, block columns]``; the last ones may be short."""
    height, width = values.shape
    bits = magnitudes(values)
    if height % rows or width % columns:
        bits = np.pad(bits, ((0, -height % rows), (0, -width % columns)))
        height, width = bits.shape
    if rows > 1:
        bits = bits.reshape(height // rows, rows, width).max(axis=1)
        height //= rows
    blocks = bits.reshape(-1, columns)
    if columns == 1:
        found = blocks[:, 0]
    elif columns < _SHORT_BLOCK:
        found = np.maximum.reduce(np.ascontiguousarray(blocks.T), axis=0)
    else:
        found = blocks.max(axis=1)
    largest: Array = found.view(values.dtype).astype(np.float32).reshape(height, width // columns)
    return largest
