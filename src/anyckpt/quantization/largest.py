"""The largest magnitude in tensors, found in a pass of its own when it is first needed, and scales made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import FormatError
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import is_hole
from anyckpt.tensor import LazyTensor, Reduction, Stored

_FLOAT32 = dtype("float32")
_TINY = np.finfo(np.float32).tiny


def magnitudes(values: Array) -> Array:
    """Bit patterns of absolute values, unsigned integers in the same order as the numbers."""
    width = values.dtype.itemsize
    bits: Array = np.bitwise_and(values.view(f"u{width}"), (1 << 8 * width - 1) - 1)
    return bits


def largest_of(values: Array) -> float:
    """The largest magnitude in an array; infinite or not-a-number if any is."""
    width = values.dtype.itemsize
    sign = 1 << 8 * width - 1
    positive, negative = int(values.view(f"i{width}").max()), int(values.view(f"u{width}").max())
    bits = max(positive, negative - sign if negative >= sign else 0, 0)  # of two's complements the signed ones are last
    return float(np.array([bits], f"u{width}").view(values.dtype)[0])


def check_finite(largest: object, name: str | None) -> None:
    """Raise FormatError, about the weight of this name if there is one, unless what was found is numbers."""
    if not np.isfinite(largest).all():  # type: ignore[call-overload]
        raise FormatError(
            "the weight holds infinite values or not-a-numbers, of which no scale can be made",
            tensor=name,
            expected="numbers",
            found="inf or nan",
            remedy="find them with anyckpt verify --deep, or leave the module as it is with --quantize-exclude",
        )


class Largest(Reduction[float]):
    """The largest magnitude in some tensors together.

    Args:
        tensors: floating point.
        names: theirs, for messages, or none.
    """

    def __init__(self, tensors: Sequence[LazyTensor], names: Sequence[str] = ()) -> None:
        super().__init__([(tensor,) for tensor in tensors])
        self.tensors = tuple(tensors)
        self.names = tuple(names)

    def identity(self) -> Identity:
        return self.tensors

    def __reduce__(self) -> tuple[type[Largest], tuple[Sequence[LazyTensor], Sequence[str]]]:
        return Largest, (self.tensors, self.names)

    def nothing(self) -> float:
        return 0.0

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> float:
        """
        Raises:
            FormatError: elements are infinite or no numbers.
        """
        found = largest_of(arrays[0])
        check_finite(found, self.names[group] if self.names else None)
        return found

    def join(self, first: float, second: float) -> float:
        return max(first, second)


_known: WeakValueDictionary[tuple[int, ...], Largest] = WeakValueDictionary()


def largest_in(tensors: Sequence[LazyTensor], names: Sequence[str] = ()) -> Largest:
    """The largest magnitude in some tensors: one for all who ask for that of the same ones, so that it is found once.

    Args:
        tensors: floating point.
        names: theirs, for messages, or none.
    """
    key = tuple(map(id, tensors))  # of tensors that live as long as what is found holds them
    found = _known.get(key)
    if found is None:
        found = _known[key] = Largest(tensors, names)
    return found


@dataclass(frozen=True)
class TensorScale:
    """What all codes of a tensor are multiplied by: its largest magnitude over the largest number, in float32.

    Attributes:
        largest: the largest magnitude.
        over: the largest number.
        inverted: the other way round, as compressed-tensors states it for NVFP4.
    """

    largest: Largest
    over: float
    inverted: bool = False

    def value(self) -> Any:
        """The scale, a numpy float32; 1 for nothing but zeros.

        Raises:
            FormatError: as ``Largest.value``.
        """
        found = np.float32(self.largest.value())
        if found == 0:
            return np.float32(1)
        found, over = max(found, _TINY), np.float32(self.over)
        return np.float32(over / found if self.inverted else found / over)

    def identity(self) -> Identity:
        return self.largest, self.over, self.inverted


class ScaleOfTensor(LazyTensor):
    """A scale as a tensor of one element, float32."""

    __slots__ = ("scale",)

    def __init__(self, scale: TensorScale, shape: Shape) -> None:
        self.scale = scale
        self.dtype = _FLOAT32
        self.shape = shape

    def identity(self) -> Identity:
        return self.scale, self.shape

    def pieces(self) -> Iterator[Stored]:
        for tensor in self.scale.largest.tensors:
            yield from tensor.pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size and not is_hole(out):
            out[...] = np.array([self.scale.value()], np.float32).view(self.dtype.raw)[0]

    def _reshape(self, shape: Shape) -> LazyTensor:
        return ScaleOfTensor(self.scale, shape)
