"""One pass over a tensor's elements: statistics and a digest, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import AnyckptError, UnsafeError
from anyckpt.indexing import Array, look_up
from anyckpt.operations.steps.dots import dot, total
from anyckpt.operations.steps.number_bits import PATTERNS, NumberBits
from anyckpt.operations.steps.threads import Advance
from anyckpt.storage.gather import scratch
from anyckpt.tensor import LazyTensor
from anyckpt.tensor.halves import widen

_CHUNK_ELEMENTS = 1 << 16  # their float64 copy stays in the processor's cache

_POWERS, _BIAS = 1 << 11, 1023
"""Of float64's exponents: how many there are, and which of them is that of one."""

_ROOM = 8 + 1
"""Bytes to compute moments in for each element of a chunk."""

_LEAST_LEFT = 0.25
"""Of a sum of squares, the part that the deviations from the mean must be to be had by subtracting that of the mean."""

_UNIT_OF_LARGE = 2.0**-600
"""What numbers are multiplied by whose squares float64 cannot hold."""

_LARGE = 1 << 30
_REPETITIONS = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """What the elements of one tensor are like.

    ``min``, ``max``, ``mean`` and ``std`` (of the population) are over the finite elements, in float64, and None if
    there are none; of complex numbers they describe the magnitude, of booleans 0 and 1.

    Attributes:
        min: smallest finite value.
        max: largest finite value.
        mean: mean of the finite values.
        std: standard deviation of the finite values.
        zeros: elements equal to zero, of either sign.
        nan: elements that are not a number.
        inf: elements that are infinite, of either sign.
        negative_inf: those of these that are below zero.
        denormals: non-zero elements below the smallest normal number of a type of 16 bits or more.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    zeros: int
    nan: int
    inf: int
    denormals: int
    negative_inf: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; a moment too large for float64 is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Magnitudes:
    """How many elements have which magnitude, by powers of two.

    Attributes:
        lowest: the smallest power that any element reaches.
        counts: element ``i`` is the number of finite elements with ``2**(lowest + i) <= |x| < 2**(lowest + i + 1)``;
            zeros are in none.
    """

    lowest: int
    counts: tuple[int, ...]

    def __add__(self, other: Magnitudes) -> Magnitudes:
        lowest = min(self.lowest, other.lowest)
        top = max(one.lowest + len(one.counts) for one in (self, other))
        counts = np.zeros(top - lowest, np.int64)
        for one in (self, other):
            counts[one.lowest - lowest :][: len(one.counts)] += one.counts
        return Magnitudes(lowest, tuple(counts.tolist()))


class _Moments:
    """Count, mean and squared deviations, merged chunk by chunk (Chan, Golub and LeVeque) so that nothing cancels."""

    def __init__(self, kind: DType, most: int, memory: Array, magnitudes: bool) -> None:
        self.count = 0
        self.mean = self.squares = 0.0  # of numbers times the unit
        self._unit = 1.0
        self.low: float | None = None
        self.high: float | None = None
        self._bits = NumberBits(kind, most, memory) if kind.name in PATTERNS else None
        self.zeros = self.nan = self.inf = self.negative_inf = 0  # of types that are not counted by their bits
        self._values, self._some = memory[: 8 * most].view(np.float64), memory[8 * most :].view(np.bool_)
        self._powers = np.zeros(_POWERS, np.int64) if magnitudes else None

    def add(self, chunk: Array) -> None:
        if self._bits is not None:
            self._bits.add(chunk)
        values = self._values[: len(chunk)]
        if chunk.itemsize == 1 and chunk.dtype.kind not in "iu":
            look_up(_numbers_of_a_byte(chunk.dtype), chunk.view(np.uint8), values)
        else:
            widen(values, chunk)
        whole = total(values)
        if not math.isfinite(whole):
            finite = np.isfinite(values)
            nan = int(np.count_nonzero(np.isnan(values)))
            self.nan += nan
            self.inf += len(values) - int(np.count_nonzero(finite)) - nan
            self.negative_inf += int(np.count_nonzero(np.isneginf(values)))
            chunk, values = chunk[finite], values[finite]
            whole = total(values)
        if not len(values):
            return
        if self._powers is not None:
            self._powers += np.bincount((values.view(np.int64) >> 52) & (_POWERS - 1), minlength=_POWERS)
        count = len(values)
        if self._bits is None:
            exact = chunk if chunk.dtype.kind in "iu" else values  # of which ml_dtypes takes a hundred times as long
            low, high = exact.min().item(), exact.max().item()
            self.low = low if self.low is None else min(self.low, low)
            self.high = high if self.high is None else max(self.high, high)
            self.zeros += int(np.count_nonzero(np.equal(values, 0, out=self._some[:count])))
        else:
            self._bits.add_extremes(chunk)
        if self._unit != 1:
            whole = total(np.multiply(values, self._unit, out=values))
        uncentred = dot(values, values)
        if uncentred == math.inf:
            self._unit = _UNIT_OF_LARGE
            self.mean, self.squares = self.mean * self._unit, self.squares * self._unit * self._unit
            whole = total(np.multiply(values, self._unit, out=values))
            uncentred = dot(values, values)
        mean = whole / count
        squares = uncentred - whole * mean
        if not squares >= _LEAST_LEFT * uncentred < math.inf:
            np.subtract(values, mean, out=values)
            squares = dot(values, values)
        shift, both = mean - self.mean, self.count + count
        self.squares += squares + shift * shift * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    def result(self) -> Statistics:
        some = self.count > 0
        counted = self if self._bits is None else self._bits
        low, high = (self.low, self.high) if self._bits is None else self._bits.extremes()
        return Statistics(
            low,
            high,
            self.mean / self._unit if some else None,
            math.sqrt(self.squares / self.count) / self._unit if some else None,
            counted.zeros,
            counted.nan,
            counted.inf,
            0 if self._bits is None else self._bits.denormals,
            counted.negative_inf,
        )

    def magnitudes(self) -> Magnitudes | None:
        """None if they were not asked for, or if there is nothing but zeros."""
        found = np.zeros(0, np.int64) if self._powers is None else np.flatnonzero(self._powers[1:])
        if self._powers is None or not len(found):
            return None
        low, high = int(found[0]) + 1, int(found[-1]) + 2
        return Magnitudes(low - _BIAS, tuple(self._powers[low:high].tolist()))


def _sha256() -> Any:
    import hashlib  # which loads a library of its own, and is seldom asked for

    return hashlib.sha256()


@dataclass(frozen=True)
class Scan:
    """What one pass found.

    Attributes:
        statistics: None if not asked for, or if numpy cannot compute with the type (packed sub-byte types).
        sha256: hexadecimal digest of the little-endian bytes in C order, or None if not asked for.
        magnitudes: None if not asked for, or as ``statistics``.
    """

    statistics: Statistics | None
    sha256: str | None
    magnitudes: Magnitudes | None = None

    def to_json(self) -> dict[str, Any]:
        """As ``of_json`` takes it."""
        return asdict(self)

    @staticmethod
    def of_json(values: dict[str, Any]) -> Scan:
        """What ``to_json`` was asked of, with the same numbers."""
        statistics, magnitudes = values["statistics"], values["magnitudes"]
        return Scan(
            None if statistics is None else Statistics(**statistics),
            values["sha256"],
            None if magnitudes is None else Magnitudes(magnitudes["lowest"], tuple(magnitudes["counts"])),
        )


def scan(
    tensor: LazyTensor,
    *,
    statistics: bool,
    digest: bool,
    magnitudes: bool = False,
    advance: Advance | None = None,
) -> Scan:
    """Read a tensor once.

    Args:
        tensor: what to read.
        statistics: whether to compute them.
        digest: whether to compute the SHA-256.
        magnitudes: whether to count them with the statistics.
        advance: called with the number of bytes of each chunk read.

    Raises:
        FormatError: bytes are missing from a file.
        UnsafeError: a few stored bytes are repeated so often that reading them all is a denial of service.
    """
    _check_expansion(tensor)
    sha = _sha256() if digest else None
    most = min(_CHUNK_ELEMENTS, tensor.size)
    with scratch(_ROOM * most) as memory, np.errstate(all="ignore"):
        some = statistics and _is_number(tensor)
        moments = _Moments(tensor.dtype, most, memory, magnitudes) if some else None
        for chunk in tensor.chunks(_CHUNK_ELEMENTS * tensor.dtype.itemsize):
            if sha is not None:
                sha.update(chunk.view(np.uint8).data)
            if moments is not None:
                moments.add(_real(chunk, tensor.dtype.name))
            if advance is not None:
                advance(chunk.nbytes)
    told = None if sha is None else sha.hexdigest()
    return Scan(None, told) if moments is None else Scan(moments.result(), told, moments.magnitudes())


@dataclass(frozen=True)
class Scanning:
    """How tensors of a checkpoint are read; see ``scan``."""

    statistics: bool
    digest: bool
    magnitudes: bool

    def of(self, name: str, tensor: LazyTensor, advance: Advance) -> Scan:
        """What one pass finds in the tensor of this name, which an error tells.

        Raises:
            AnyckptError: as of :func:`scan`.
        """
        try:
            return scan(
                tensor, statistics=self.statistics, digest=self.digest, magnitudes=self.magnitudes, advance=advance
            )
        except AnyckptError as error:
            error.tensor = error.tensor or name
            raise

    def told(self, name: str, tensor: LazyTensor, advance: Advance) -> dict[str, Any]:
        """The same in values that JSON has."""
        return self.of(name, tensor, advance).to_json()


def counts(tensor: LazyTensor, advance: Advance | None = None) -> Statistics | None:
    """What :func:`scan` counts, from the bits of the elements; None if that is not known of the type.

    Minimum, maximum, mean and deviation are None.

    Raises:
        FormatError: bytes are missing from a file.
        UnsafeError: as of :func:`scan`.
    """
    if tensor.dtype.name not in PATTERNS:
        return None
    _check_expansion(tensor)
    most = min(_CHUNK_ELEMENTS, tensor.size)
    with scratch(most * (tensor.dtype.itemsize + 1)) as memory:
        bits = NumberBits(tensor.dtype, most, memory)
        for chunk in tensor.chunks(_CHUNK_ELEMENTS * tensor.dtype.itemsize):
            bits.add(chunk)
            if advance is not None:
                advance(chunk.nbytes)
    return Statistics(None, None, None, None, bits.zeros, bits.nan, bits.inf, bits.denormals, bits.negative_inf)


def _check_expansion(tensor: LazyTensor) -> None:
    if tensor.nbytes <= _LARGE:
        return
    stored = sum(piece.stored_bytes() for piece in tensor.pieces())
    if 0 < stored * _REPETITIONS < tensor.nbytes:
        raise UnsafeError(
            "repeats a few stored bytes too often to be read whole",
            expected=f"at most {_REPETITIONS} times its {stored} stored bytes",
            found=f"{tensor.nbytes} bytes",
            remedy="exclude this tensor",
        )


def _is_number(tensor: LazyTensor) -> bool:
    return tensor.dtype.numpy is not None or tensor.dtype.name == "complex32"


def _real(chunk: Array, name: str) -> Array:
    """A chunk as real numbers that numpy reduces correctly."""
    if name == "complex32":
        pairs = chunk.view("<f2").reshape(-1, 2).astype(np.float64)
        return _magnitude(pairs[:, 0], pairs[:, 1])
    if chunk.dtype.kind == "c":
        return _magnitude(chunk.real.astype(np.float64), chunk.imag.astype(np.float64))
    if chunk.dtype.kind == "b":
        ones: Array = chunk.view(np.uint8) != 0
        return ones.astype(np.uint8)
    return chunk


@cache
def _numbers_of_a_byte(kind: np.dtype[Any]) -> Array:
    every: Array = np.arange(256, dtype=np.uint8).view(kind)
    return every.astype(np.float64)


def _magnitude(real: Array, imaginary: Array) -> Array:
    result: Array = np.hypot(real, imaginary)
    return result
