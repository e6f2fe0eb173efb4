"""What of a model's update is left where only a share of it is wanted: the largest elements, or some by chance."""

from __future__ import annotations

import hashlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.identity import ElementWise, Identity, OfFields
from anyckpt.indexing import Array, Shape
from anyckpt.tensor import LazyTensor, Mapped, Reduction

_HALF = 1 << 16
_WORDS = 8  # numbers of 32 bits that one step of the generator's counter gives
_RANGE = 1 << 32


def keep(values: Array, kept: Array) -> None:
    """Put zeros in the place of elements that are not kept, also of those that are no numbers.

    By their bits: numpy takes some ten times as long to assign where a mask says so.
    """
    kind = f"u{values.dtype.itemsize}"
    mask = np.negative(np.asarray(kept).astype(kind))  # of 1 all bits
    np.bitwise_and(values.view(kind), mask, out=values.view(kind))


class Sparsity(OfFields, ABC):
    """What is left of an update: a frozen dataclass, all of it in its fields."""

    @abstractmethod
    def __call__(self, update: Array, start: Shape, whole: Shape) -> None:
        """Put zeros in the place of what is not left in a box of an update, and scale what is.

        Args:
            update: its elements.
            start: its first index along each axis.
            whole: shape of the tensor that it is of.
        """


@dataclass(frozen=True)
class Whole(Sparsity):
    """All of it."""

    def __call__(self, update: Array, start: Shape, whole: Shape) -> None:
        pass


@dataclass(frozen=True)
class Nothing(Sparsity):
    """Nothing of it."""

    def __call__(self, update: Array, start: Shape, whole: Shape) -> None:
        update[...] = 0


@dataclass(frozen=True)
class ByChance(Sparsity):
    """Every element with the same probability, whichever block it is read in.

    The numbers are those of Philox, a generator that gives any of its numbers by their place, which is the element's.

    Attributes:
        key: of the generator, 128 bits.
        density: the probability.
        rescaled: what is left is divided by it, so that the expected update is as it was.
    """

    key: tuple[int, int]
    density: float
    rescaled: bool = True

    def __call__(self, update: Array, start: Shape, whole: Shape) -> None:
        below = np.uint32(min(_RANGE - 1, round(self.density * _RANGE)))
        keep(update, self._numbers(start, update.shape, whole) < below)
        if self.rescaled:
            np.divide(update, self.density, out=update)

    def _numbers(self, start: Shape, shape: Shape, whole: Shape) -> Array:
        """One number for each element of a box."""
        together = len(shape)  # axes from here on lie in one run
        run = 1
        while together and run == math.prod(whole[together:]):
            together -= 1
            run *= shape[together]
        out: Array = np.empty((math.prod(shape[:together]), run), np.uint32)
        strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
        base = sum(b * s for b, s in zip(start, strides, strict=True))
        for row, place in enumerate(np.ndindex(*shape[:together])):
            first = base + sum(i * s for i, s in zip(place, strides, strict=False))
            out[row] = self._run(first, run)
        return out.reshape(shape)

    def _run(self, first: int, count: int) -> Array:
        counter, skipped = divmod(first, _WORDS)
        generator = np.random.Philox(key=np.array(self.key, np.uint64), counter=counter)
        words: Array = generator.random_raw(-(-(skipped + count) // 2)).astype("<u8", copy=False).view("<u4")
        return words[skipped : skipped + count]


def chance(seed: int, name: str, number: int, density: float, *, rescaled: bool) -> Sparsity:
    """A share of an update by chance, which depends on the seed, the weight's name and the model's number alone."""
    if density >= 1:
        return Whole()
    if density <= 0:
        return Nothing()
    digest = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=16).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return ByChance(key, density, rescaled)


@dataclass(frozen=True)
class Difference(ElementWise):
    """What one has more than another, in float32."""

    def __call__(self, a: Array, b: Array) -> Array:
        wide = np.float64 if max(a.dtype.itemsize, b.dtype.itemsize) > 2 else np.float32
        difference: Array = (a.astype(wide) - b.astype(wide)).astype(np.float32)
        return difference


class _Counts(Reduction[Array]):
    """How many elements have which half of their magnitude's bits: the high one, or the low one below a high one."""

    def __init__(self, operands: Sequence[Sequence[LazyTensor]], high: int | None = None) -> None:
        super().__init__(operands)
        self.high = high

    def nothing(self) -> Array:
        return np.zeros(_HALF, np.int64)

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> Array:
        bits = _magnitude(arrays[0])
        if self.high is None:
            return np.bincount(bits >> 16, minlength=_HALF)
        return np.bincount(bits[bits >> 16 == self.high] & (_HALF - 1), minlength=_HALF)

    def join(self, first: Array, second: Array) -> Array:
        first += second
        return first


class _Equal(Reduction[list[tuple[int, int]]]):
    """The first element of each run, and how many of its elements are of one magnitude."""

    def __init__(self, operands: Sequence[Sequence[LazyTensor]], bits: int) -> None:
        super().__init__(operands)
        self.bits = bits

    def nothing(self) -> list[tuple[int, int]]:
        return []

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> list[tuple[int, int]]:
        return [(start, int(np.count_nonzero(_magnitude(arrays[0]) == self.bits)))]

    def join(self, first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[tuple[int, int]]:
        first += second
        return first


class _Sums(Reduction[list[tuple[float, float]]]):
    """The sum of all magnitudes in each run, and of those above one."""

    def __init__(self, operands: Sequence[Sequence[LazyTensor]], bits: int) -> None:
        super().__init__(operands)
        self.bits = bits

    def nothing(self) -> list[tuple[float, float]]:
        return []

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> list[tuple[float, float]]:
        sizes = np.abs(arrays[0])
        above = sizes[_magnitude(arrays[0]) > self.bits]
        return [(float(sizes.sum(dtype=np.float64)), float(above.sum(dtype=np.float64)))]

    def join(self, first: list[tuple[float, float]], second: list[tuple[float, float]]) -> list[tuple[float, float]]:
        first += second
        return first


def _magnitude(values: Array) -> Array:
    """The bits of float32's magnitudes, which are in the order of the numbers."""
    bits: Array = np.bitwise_and(values.view(np.uint32), 0x7FFFFFFF)
    return bits


Pass = TypeVar("Pass", bound=Reduction[Any])


class Top:
    """Which magnitude the k-th largest element of an update has, and which of its equals are among the k.

    Found half by half of the magnitude's bits, so that what is held are counts, whatever the tensor's size.

    Args:
        update: float32.
        count: k, at least 1.
    """

    def __init__(self, update: LazyTensor, count: int) -> None:
        self.update = update
        self.count = count
        self._lock = threading.Lock()
        self._passes: dict[str, Any] = {}  # those that threads are at; gone when what they give is known
        self._found: tuple[int, int, int] | None = None
        self._times: float | None = None

    def identity(self) -> Identity:
        return self.update, self.count

    def __reduce__(self) -> tuple[type[Top], tuple[LazyTensor, int]]:
        return Top, (self.update, self.count)

    def found(self) -> tuple[int, int, int]:
        """The magnitude's bits, how many that are equal to it are among the k, and the first element, counted in C
        order, from which on they are not.

        Raises:
            FormatError: bytes are missing from a file.
        """
        if self._found is None:
            high, above = _reached(self._pass("high", _Counts).value(), self.count)
            counts = self._pass("low", _Counts, high).value()
            low, more = _reached(counts, self.count - above)
            bits, equal = high << 16 | low, self.count - above - more
            ties = bool(bits) and equal < counts[low] and self._found is None
            end = self._end(bits, equal) if ties else self.update.size
            with self._lock:
                if self._found is None:
                    self._found = bits, equal, end
                    self._passes.clear()
        return self._found

    def _pass(self, name: str, kind: Callable[..., Pass], *arguments: int) -> Pass:
        """The pass of a name, one for all threads."""
        with self._lock:
            made: Pass = self._passes.get(name) or kind([(self.update,)], *arguments)
            self._passes[name] = made
            return made

    def _end(self, bits: int, left: int) -> int:
        counts = self._pass("equal", _Equal, bits).value()
        for number, (start, count) in enumerate(counts):
            if left <= count:
                stop = counts[number + 1][0] if number + 1 < len(counts) else self.update.size
                values = self.update.reshape((-1,)).narrow(0, start, stop - start).numpy()
                return start + int(np.flatnonzero(_magnitude(values) == bits)[left - 1]) + 1
            left -= count
        raise AssertionError  # there are at least as many as were counted

    def times(self) -> float:
        """By what the k elements are multiplied to come to the sum of all magnitudes; 1 where these are nothing.

        Raises:
            FormatError: bytes are missing from a file.
        """
        if self._times is None:
            bits, equal, _ = self.found()
            runs = self._pass("sums", _Sums, bits).value()
            size = float(np.array([bits], np.uint32).view(np.float32)[0])
            whole, left = math.fsum(a for a, _ in runs), math.fsum(b for _, b in runs) + equal * size
            self._times = whole / left if min(whole, left) >= _NOTHING else 1.0
        return self._times


_NOTHING = 1e-7


def _reached(counts: Array, wanted: int) -> tuple[int, int]:
    """The place from the end where counts come to what is wanted, and how many are beyond it."""
    beyond = np.cumsum(counts[::-1])
    place = int(np.searchsorted(beyond, wanted))
    return len(counts) - 1 - place, int(beyond[place - 1]) if place else 0


@dataclass(frozen=True)
class Largest(Sparsity):
    """The elements of the largest magnitudes; of equal ones the first.

    Attributes:
        top: which they are.
        rescaled: what is left is multiplied so that the sum of magnitudes is as it was.
    """

    top: Top
    rescaled: bool = False

    def __call__(self, update: Array, start: Shape, whole: Shape) -> None:
        sizes = _magnitude(np.ascontiguousarray(update, np.float32).reshape(update.shape))
        bits, _, end = self.top.found()
        kept = sizes >= bits
        if end < math.prod(whole):
            equal = sizes == bits
            if equal.any():
                kept &= ~equal | (_places(start, update.shape, whole) < end)
        keep(update, kept)
        if self.rescaled:
            np.multiply(update, self.top.times(), out=update)


def _places(start: Shape, shape: Shape, whole: Shape) -> Array:
    """The number of each element of a box, counted in C order of the whole."""
    places: Array = np.zeros(shape, np.int64)
    for axis, (begin, count) in enumerate(zip(start, shape, strict=True)):
        stride = math.prod(whole[axis + 1 :])
        along = (begin + np.arange(count, dtype=np.int64)) * stride
        places += along.reshape((count,) + (1,) * (len(shape) - axis - 1))
    return places


def largest(tensor: LazyTensor, base: LazyTensor, density: float, *, rescaled: bool) -> Sparsity:
    """The share of an update's elements that have the largest magnitudes; at least one."""
    if density >= 1:
        return Whole()
    if density <= 0 or not tensor.size:
        return Nothing()
    update = Mapped((tensor, base), dtype("float32"), Difference())
    return Largest(Top(update, max(1, int(density * tensor.size))), rescaled)
