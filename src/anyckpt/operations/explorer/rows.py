"""The rows of a table of tensors: each tensor, or alike ones together where there are too many."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

from anyckpt.checkpoint.grouping import grouped
from anyckpt.data_classes import dataclass
from anyckpt.operations.explorer.names import Standing, standings
from anyckpt.operations.inspection import TensorFacts
from anyckpt.operations.steps.statistics import Magnitudes, Statistics

MOST_ROWS = 4000

_REST = "(other tensors)"


@dataclass(frozen=True)
class Tensors:
    """One tensor, or several.

    Attributes:
        name: of one; of several, what their names have in common.
        count: how many there are.
        dtype: their type, or ``several``.
        shape: of each; None if they differ.
        elements: of all.
        nbytes: of all, those that two share once.
        shards: stored pieces of all.
        files: file -> bytes in it.
        statistics: over all elements, None if any has none.
        magnitudes: the same.
    """

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...] | None
    elements: int
    nbytes: int
    shards: int
    files: dict[str, int]
    statistics: Statistics | None
    magnitudes: Magnitudes | None

    @property
    def largest(self) -> float | None:
        """The largest magnitude."""
        found = self.statistics
        return None if found is None or found.min is None or found.max is None else max(abs(found.min), abs(found.max))

    @property
    def peak(self) -> float | None:
        """The largest magnitude in standard deviations, which tells outliers; None where nothing varies."""
        largest, deviation = self.largest, None if self.statistics is None else self.statistics.std
        return None if largest is None or not deviation else largest / deviation


def row_of(facts: TensorFacts) -> Tensors:
    """One tensor; one that has the bytes of another takes none."""
    return Tensors(
        facts.name,
        1,
        facts.dtype,
        facts.shape,
        math.prod(facts.shape),
        0 if facts.same_as is not None else facts.nbytes,
        facts.shards,
        dict(zip(facts.files, facts.file_bytes, strict=True))
        if facts.same_as is None
        else dict.fromkeys(facts.files, 0),
        facts.statistics,
        facts.magnitudes,
    )


def together(name: str, several: Sequence[Tensors]) -> Tensors:
    """Several as one.

    Args:
        name: what to call them.
        several: at least one.
    """
    if len(several) == 1:
        return several[0]
    files: dict[str, int] = {}
    for one in several:
        for file, nbytes in one.files.items():
            files[file] = files.get(file, 0) + nbytes
    dtypes, shapes = {one.dtype for one in several}, {one.shape for one in several}
    return Tensors(
        name,
        sum(one.count for one in several),
        dtypes.pop() if len(dtypes) == 1 else "several",
        shapes.pop() if len(shapes) == 1 else None,
        sum(one.elements for one in several),
        sum(one.nbytes for one in several),
        sum(one.shards for one in several),
        files,
        _statistics(several),
        _magnitudes(several),
    )


def folded(tensors: Sequence[Tensors], told: Mapping[str, Standing], most: int = MOST_ROWS) -> list[Tensors]:
    """At most ``most`` rows: alike tensors of a layer together if need be, then alike layers, then the smallest.

    Args:
        tensors: each one tensor.
        told: where each stands.
        most: how many rows there may be.
    """
    rows = list(tensors)
    for by_layer in (True, False):
        if len(rows) <= most:
            return rows
        rows = _alike(tensors, {one.name: told[one.name].layer if by_layer else None for one in tensors})
    if len(rows) <= most:
        return rows
    large = set(sorted(range(len(rows)), key=lambda i: -rows[i].nbytes)[: most - 1])
    rest = together(_REST, [row for i, row in enumerate(rows) if i not in large])
    return [*(row for i, row in enumerate(rows) if i in large), rest]


@dataclass(frozen=True)
class Stack:
    """Layers that follow one another.

    Attributes:
        name: what they are called, such as ``model.layers``.
        layers: their numbers.
        cells: kind of tensor -> layer -> the tensors of this kind in it.
    """

    name: str
    layers: tuple[int, ...]
    cells: dict[str, dict[int, Tensors]]


def stacks_of(tensors: Sequence[Tensors]) -> tuple[list[Stack], dict[str, Standing]]:
    """The stacks of layers, the largest first, and where each tensor stands."""
    told = standings(one.name for one in tensors)
    found: dict[str, dict[str, dict[int, list[Tensors]]]] = {}
    for one in tensors:
        where = told[one.name]
        if where.layer is not None:
            found.setdefault(where.stack, {}).setdefault(where.kind, {}).setdefault(where.layer, []).append(one)
    stacks = []
    for name, kinds in found.items():
        layers = tuple(sorted({layer for numbers in kinds.values() for layer in numbers}))
        cells = {
            kind: {layer: together(kind, several) for layer, several in numbers.items()}
            for kind, numbers in kinds.items()
        }
        stacks.append(Stack(name, layers, cells))
    stacks.sort(key=lambda stack: -sum(one.nbytes for numbers in stack.cells.values() for one in numbers.values()))
    return stacks, told


def _alike(tensors: Sequence[Tensors], apart: Mapping[str, Hashable]) -> list[Tensors]:
    """Tensors of one type and shape together whose names differ in numbers only, but for those that stay apart."""
    named = {one.name: one for one in tensors}
    groups = grouped({one.name: (one.dtype, one.shape, apart[one.name]) for one in tensors})
    return [together(group.name, [named[name] for name in group]) for group in groups]


def _magnitudes(several: Iterable[Tensors]) -> Magnitudes | None:
    found = [one.magnitudes for one in several if one.magnitudes is not None]
    return None if not found else sum(found[1:], found[0])


def _statistics(several: Sequence[Tensors]) -> Statistics | None:
    found = [(one.elements, one.statistics) for one in several if one.statistics is not None]
    if len(found) < len(several):
        return None
    count = 0
    mean = squares = 0.0
    for elements, one in found:
        finite = elements - one.nan - one.inf
        if one.mean is None or one.std is None or not finite:
            continue
        both = count + finite
        shift = one.mean - mean
        squares += one.std * one.std * finite + shift * shift * count * finite / both
        mean += shift * finite / both
        count = both
    lows = [one.min for _, one in found if one.min is not None]
    highs = [one.max for _, one in found if one.max is not None]
    return Statistics(
        min(lows, default=None),
        max(highs, default=None),
        mean if count else None,
        math.sqrt(squares / count) if count else None,
        zeros=sum(one.zeros for _, one in found),
        nan=sum(one.nan for _, one in found),
        inf=sum(one.inf for _, one in found),
        denormals=sum(one.denormals for _, one in found),
        negative_inf=sum(one.negative_inf for _, one in found),
    )
