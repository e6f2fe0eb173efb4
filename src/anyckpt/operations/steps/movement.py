"""How far tensors, and layers of them, are from one another: norms, angle, largest and mean difference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, field
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.indexing import CACHED_ELEMENTS, Array
from anyckpt.operations.steps.dots import dot, total
from anyckpt.tensor.halves import widen

_LAYER = re.compile(r".*?\.\d+(?=\.)")
_SUFFIXES = re.compile(r"\.[^.]*\Z")


@dataclass(frozen=True)
class Movement:
    """How far the elements of one tensor, or of all tensors of a layer, are from those of another checkpoint.

    All is over every element, in float64; one NaN makes NaN of it.  Of complex numbers it is of their magnitudes.

    Attributes:
        name: the tensor's, or the layer's.
        tensors: how many there are.
        elements: of all of these.
        differing: how many of them differ beyond the tolerance.
        norm_a: Euclidean norm of the first checkpoint's elements.
        norm_b: of the second's.
        norm_of_difference: of ``a - b``.
        max_abs: largest ``|a - b|``.
        mean_abs: mean of ``|a - b|``.
        cosine: of the angle between both; None if a norm is zero.
    """

    name: str
    tensors: int
    elements: int
    differing: int
    norm_a: float
    norm_b: float
    norm_of_difference: float
    max_abs: float
    mean_abs: float
    cosine: float | None

    @property
    def relative(self) -> float:
        """``norm_of_difference / norm_a``; 0 where nothing differs, infinite where the first is all zeros."""
        if self.norm_of_difference == 0:
            return 0.0
        return math.inf if self.norm_a == 0 else self.norm_of_difference / self.norm_a

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is no finite number is ``"NaN"`` or ``"Infinity"``, as in JSON of protocol buffers."""
        values = {"name": self.name, "relative": self.relative, **asdict(self)}
        return {name: number_to_json(value) for name, value in values.items()}


def number_to_json(value: Any) -> Any:
    """A value that strict JSON has a word for."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass
class Sums:
    """What a movement is computed of, added up run by run."""

    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0
    squares_of_gap: float = 0.0
    gaps: float = 0.0
    largest: float = 0.0
    elements: int = 0
    differing: int = 0
    _scratch: list[Array] = field(default_factory=list, repr=False, compare=False)

    def add(self, a: Array, b: Array, *, same: bool) -> None:
        """Account for a run of elements.

        Args:
            a: numbers.
            b: as many others.
            same: they are the same, bit by bit.
        """
        if not self._scratch:
            self._scratch = [np.empty(CACHED_ELEMENTS, np.float64) for _ in range(3)]
        self.elements += len(a)
        step = CACHED_ELEMENTS
        if "c" in (a.dtype.kind, b.dtype.kind):
            a, b = (side.astype(np.complex128).view(np.float64) for side in (a, b))
            self._add_gaps(np.abs((a - b).view(np.complex128)))
            for start in range(0, len(a), step):
                self._add_block(a[start : start + step], b[start : start + step], same, gaps=False)
            return
        for start in range(0, len(a), step):
            self._add_block(a[start : start + step], b[start : start + step], same, gaps=True)

    def _add_block(self, a: Array, b: Array, same: bool, *, gaps: bool) -> None:
        first, second, gap = (array[: len(a)] for array in self._scratch)
        widen(first, a)
        squares = dot(first, first)
        self.squares_a += squares
        if same and math.isfinite(squares):
            self.squares_b += squares
            self.products += squares
            return
        widen(second, b)
        self.squares_b += dot(second, second)
        self.products += dot(first, second)
        np.subtract(first, second, out=gap)
        self.squares_of_gap += dot(gap, gap)
        if gaps:
            self._add_gaps(np.abs(gap, out=gap))

    def _add_gaps(self, gaps: Array) -> None:
        self.gaps += total(gaps)
        self.largest = _larger(self.largest, float(gaps.max()))  # which is NaN where any is

    def movement(self, name: str) -> Movement:
        """What they come to."""
        a, b, gap = (math.sqrt(squares) for squares in (self.squares_a, self.squares_b, self.squares_of_gap))
        mean = self.gaps / self.elements if self.elements else 0.0
        cosine = _cosine(self.products, a * b)
        return Movement(name, 1, self.elements, self.differing, a, b, gap, self.largest, mean, cosine)


def together(name: str, parts: Iterable[Movement]) -> Movement:
    """The movement of all elements of several tensors, from those of each."""
    tensors = elements = differing = 0
    squares = [0.0, 0.0, 0.0]
    products = gaps = largest = 0.0
    for part in parts:
        tensors, elements, differing = (tensors + part.tensors, elements + part.elements, differing + part.differing)
        for number, norm in enumerate((part.norm_a, part.norm_b, part.norm_of_difference)):
            squares[number] += norm * norm
        products += (part.cosine or 0.0) * part.norm_a * part.norm_b
        gaps += part.mean_abs * part.elements
        largest = _larger(largest, part.max_abs)
    a, b, gap = map(math.sqrt, squares)
    mean = gaps / elements if elements else 0.0
    return Movement(name, tensors, elements, differing, a, b, gap, largest, mean, _cosine(products, a * b))


def by_layer(movements: Iterable[Movement]) -> list[Movement]:
    """The movement of each layer, in the order in which they come."""
    layers: dict[str, list[Movement]] = {}
    for movement in movements:
        layers.setdefault(layer_of(movement.name), []).append(movement)
    return [together(name, parts) for name, parts in layers.items()]


_ORDERS: dict[str, Callable[[Movement], float]] = {
    "relative": lambda movement: movement.relative,
    "max": lambda movement: movement.max_abs,
    "mean": lambda movement: movement.mean_abs,
    "cosine": lambda movement: math.inf if movement.cosine is None else -movement.cosine,
}


def most_moved(movements: Iterable[Movement], sort: str | None, top: int | None) -> list[Movement]:
    """Those that moved at all, the largest first; what is NaN comes before all.

    Args:
        movements: of tensors or layers.
        sort: ``relative``, ``max``, ``mean``, ``cosine`` (the smallest first) or ``name``; None for the order given.
        top: how many; all of them if None.

    Raises:
        UsageError: there is no such way to sort.
    """
    moved = [movement for movement in movements if movement.differing or movement.norm_of_difference != 0]
    if sort == "name":
        moved.sort(key=lambda movement: movement.name)
    elif sort is not None:
        if sort not in _ORDERS:
            raise UsageError("unknown order", expected=f"name, {', '.join(_ORDERS)}", found=sort)
        order = _ORDERS[sort]
        moved.sort(key=lambda movement: _nan_first(order(movement)), reverse=True)
    return moved[:top]


def _nan_first(value: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(value) else (False, value)


def _cosine(products: float, norms: float) -> float | None:
    if norms == 0:
        return None
    return products / norms if math.isnan(products / norms) else max(-1.0, min(1.0, products / norms))


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def layer_of(name: str) -> str:
    """The layer that a tensor is of, by its name.

    ``decoder.layers.3.mlp.linear_fc1.weight`` is of ``decoder.layers.3``; a tensor outside layers is of its module,
    ``embedding.word_embeddings``.
    """
    found = _LAYER.match(name)
    return found[0] if found is not None else _SUFFIXES.sub("", name)
