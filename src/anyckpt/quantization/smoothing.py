"""What SmoothQuant and AWQ move from activations into weights: factors of a module's inputs, one for each.

A module's inputs are multiplied by its factors when it runs, and its weight's columns divided by them before they are
quantized.  The arithmetic is that of NVIDIA ModelOpt 0.40, rounding by rounding: factors in float32, the weight rounded
to the type that the model ran in; where modules become one they get the mean of their factors, and their weights are
multiplied by their own and divided by it, and rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import UsageError
from anyckpt.identity import ElementWise
from anyckpt.indexing import Array
from anyckpt.quantization.nodes import Repeated
from anyckpt.quantization.statistics import Seen
from anyckpt.tensor import LazyTensor, Mapped, from_array

_LEAST, _MOST = np.float32(1e-4), np.float32(1e4)
_NOTHING = np.float32(2.0**-31)
"""A largest input below it is taken for a channel in which there is nothing."""


def rounded(array: Array, kind: DType) -> Array:
    """Numbers of a type, in float32."""
    return array if kind.name == "float32" else array.astype(kind.numpy).astype(np.float32)


def smooth_factors(seen: Seen, alpha: float) -> Array:
    """SmoothQuant's: ``columns^(1 - alpha) / inputs^alpha``, float32 ``[K]``."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.power(seen.columns, np.float32(1 - alpha)) / np.power(seen.inputs, np.float32(alpha))
    if np.nanmin(found) <= _NOTHING:
        found[seen.inputs <= _NOTHING] = 1
    found[np.isnan(found)] = 1
    clipped: Array = np.clip(found, _LEAST, _MOST)
    return clipped


def awq_factors(seen: Seen, name: str) -> Array:
    """AWQ's, with the exponent that lost least; float32 ``[K]``.

    Raises:
        UsageError: the statistics were made without its search.
    """
    if seen.scales is None:
        raise UsageError(
            f"the statistics have nothing of the search for AWQ's factors of {name}",
            remedy="calibrate with --algorithm int4_awq or w4a8_awq",
        )
    factors: Array = np.float32(1) / seen.scales
    return factors


def mean_of(factors: Sequence[Array], kind: DType) -> Array:
    """The factors of modules that become one."""
    total = factors[0].copy()
    for one in factors[1:]:
        total += one
    return rounded(total / np.float32(len(factors)), kind)


def divided(weight: LazyTensor, factors: Array, kind: DType) -> LazyTensor:
    """A weight's columns over factors of the inputs (float32, before they are rounded), as numbers of a type."""
    return Mapped((weight, _over(weight, np.float32(1) / factors)), kind, Times(kind))


def exchanged(weight: LazyTensor, own: Array, mean: Array, kind: DType) -> LazyTensor:
    """A weight that was divided by its own factors, for inputs that are multiplied by the mean of several."""
    if np.array_equal(own, mean):
        return weight
    return Mapped((weight, _over(weight, own), _over(weight, mean)), kind, TimesOver(kind))


def times(vector: LazyTensor, factors: Array, kind: DType) -> LazyTensor:
    """A normalization's weight or bias times factors."""
    return Mapped((vector, from_array(factors)), kind, Times(kind))


def _over(weight: LazyTensor, factors: Array) -> LazyTensor:
    return Repeated(from_array(factors).reshape((1, factors.size)), (weight.shape[0], 1), weight.shape)


@dataclass(frozen=True)
class Times(ElementWise):
    """A product in float32, rounded to ``to``."""

    to: DType

    def __call__(self, values: Array, factors: Array) -> Array:
        found: Array = (values.astype(np.float32) * factors).astype(self.to.numpy)
        return found


@dataclass(frozen=True)
class TimesOver(ElementWise):
    """A product in float32 over a divisor, rounded to ``to``."""

    to: DType

    def __call__(self, values: Array, factors: Array, divisors: Array) -> Array:
        found: Array = (values.astype(np.float32) * factors / divisors).astype(self.to.numpy)
        return found
