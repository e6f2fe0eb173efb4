"""How elements of several models make one: sums, the way between two on a sphere, and updates that are thinned out.

Linear: https://arxiv.org/abs/2203.05482; task arithmetic: https://arxiv.org/abs/2212.04089; TIES:
https://arxiv.org/abs/2306.01708; DARE: https://arxiv.org/abs/2311.03099.  Results are those of mergekit 0.1.5 where
these leave nothing to chance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.identity import OfFields
from anyckpt.indexing import Array, Shape
from anyckpt.operations.steps.thinning import Sparsity, keep
from anyckpt.tensor import LazyTensor, Reduction

_NEARLY_PARALLEL = 0.9995
"""Cosine beyond which two tensors are interpolated in a line: mergekit's, and that of the code it goes back to."""
_NO_LENGTH = 1e-8
_NO_SUM = 1e-8


class Rule(OfFields, ABC):
    """What elements become: a frozen dataclass, all of it in its fields."""

    @abstractmethod
    def __call__(self, arrays: Sequence[Array], start: Shape, whole: Shape) -> Array:
        """The elements of a box; may be called in any thread.

        Args:
            arrays: the same box of each model, of the type that is computed in, and free to be overwritten.
            start: its first index along each axis.
            whole: shape of the tensor that it is of.
        """


@dataclass(frozen=True)
class Linear(Rule):
    """The sum of weighted elements, over ``divisor``.

    Attributes:
        weights: one for each model; any sign.
        divisor: their sum, or 1.
    """

    weights: tuple[float, ...]
    divisor: float = 1.0

    def __call__(self, arrays: Sequence[Array], start: Shape, whole: Shape) -> Array:
        total = _weighted(arrays, self.weights)
        return total if self.divisor == 1 else np.divide(total, self.divisor, out=total)


def _weighted(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum, in the memory of the first."""
    total = arrays[0]
    for number, (array, weight) in enumerate(zip(arrays, weights, strict=True)):
        if weight != 1:
            np.multiply(array, weight, out=array)
        if number:
            np.add(total, array, out=total)
    return total


class Angle(Reduction[list[tuple[float, float, float]]]):
    """Squared lengths and the product of two tensors as vectors, of each run of their elements."""

    _found_cosine: float | None = None

    def nothing(self) -> list[tuple[float, float, float]]:
        return []

    def look_at(self, arrays: Sequence[Array], group: int, start: int) -> list[tuple[float, float, float]]:
        a, b = (array.astype(np.float64) for array in arrays)
        return [(float(a @ a), float(b @ b), float(a @ b))]

    def join(
        self, first: list[tuple[float, float, float]], second: list[tuple[float, float, float]]
    ) -> list[tuple[float, float, float]]:
        first += second
        return first

    def cosine(self) -> float:
        """Of the angle between the two; of one without a length the length is taken to be 1."""
        if self._found_cosine is None:
            a, b, product = (math.fsum(column) for column in zip(*self.value(), strict=True))
            lengths = [length if (length := math.sqrt(square)) > _NO_LENGTH else 1.0 for square in (a, b)]
            self._found_cosine = min(1.0, max(-1.0, product / lengths[0] / lengths[1]))
        return self._found_cosine


@dataclass(frozen=True)
class Slerp(Rule):
    """The element on the arc between two tensors that are taken as vectors; on the line where they are nearly parallel.

    Attributes:
        t: 0 for the first, 1 for the second.
        angle: of the two.
    """

    t: float
    angle: Angle

    def __call__(self, arrays: Sequence[Array], start: Shape, whole: Shape) -> Array:
        cosine = self.angle.cosine()
        if abs(cosine) > _NEARLY_PARALLEL:
            return _weighted(arrays, (1 - self.t, self.t))
        theta = math.acos(cosine)
        return _weighted(arrays, [math.sin(part * theta) / math.sin(theta) for part in (1 - self.t, self.t)])


@dataclass(frozen=True)
class Updates(Rule):
    """The base, which is the first model, and what the others have learned over it, thinned out, weighted and added.

    Attributes:
        weights: one for each model besides the base.
        thinned: what of each one's update is left.
        elected: elements whose sign is not that of the weighted sum of all are left out, as TIES does it.
        normalized: the sum is divided by that of the weights that take part.
        scale: the sum is multiplied by it (mergekit's ``lambda``).
    """

    weights: tuple[float, ...]
    thinned: tuple[Sparsity, ...]
    elected: bool = False
    normalized: bool = False
    scale: float = 1.0

    def __call__(self, arrays: Sequence[Array], start: Shape, whole: Shape) -> Array:
        base, *updates = arrays
        for update, weight, thin in zip(updates, self.weights, self.thinned, strict=True):
            np.subtract(update, base, out=update)
            thin(update, start, whole)
            if weight != 1:
                np.multiply(update, weight, out=update)
        total = np.zeros_like(base)
        for update in updates:
            np.add(total, update, out=total)
        divisor = np.array(math.fsum(self.weights), base.dtype)
        if self.elected:
            total, divisor = self._elected(updates, total >= 0)
        if self.normalized:
            divisor[np.abs(divisor) < _NO_SUM] = 1
            np.divide(total, divisor, out=total)
        if self.scale != 1:
            np.multiply(total, self.scale, out=total)
        base += total
        return base

    def _elected(self, updates: Sequence[Array], positive: Array) -> tuple[Array, Array]:
        """The sum of those elements that have the sign of the sum, and that of their weights."""
        total, divisor = np.zeros_like(updates[0]), np.zeros_like(updates[0])
        for update, weight in zip(updates, self.weights, strict=True):
            taken = (positive & (update > 0)) | (~positive & (update < 0))
            keep(update, taken)
            np.add(total, update, out=total)
            np.add(divisor, np.multiply(taken, weight, dtype=divisor.dtype), out=divisor)
        return total, divisor


def slerp(t: float, first: LazyTensor, second: LazyTensor) -> Slerp:
    """The rule for two tensors."""
    return Slerp(t, Angle([(first, second)]))
