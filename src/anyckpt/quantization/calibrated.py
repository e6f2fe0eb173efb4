"""What calibration makes of a model's weights: the numbers to be coded, factors of inputs, scales of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Literal

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import UsageError
from anyckpt.indexing import Array
from anyckpt.quantization.smoothing import (
    awq_factors,
    divided,
    exchanged,
    mean_of,
    rounded,
    smooth_factors,
    times,
)
from anyckpt.quantization.statistics import Statistics
from anyckpt.tensor import LazyTensor, from_array

Smoothing = Literal["", "smoothquant", "awq"]
"""What moves from activations into weights."""

_LEAST_SCALE = np.float32(0.01)
"""Of FP8 and INT8 activations of a decoder that NeMo calls ``gpt``, which it clamps so."""


@dataclass(frozen=True)
class Calibration:
    """What calibration says of weights that have a target's names.

    Attributes:
        values: name of a weight -> the numbers to be coded, where these are others than the weight's.
        largest: module -> the largest magnitude of what it multiplies by its weight.
        factors: module -> what its inputs are multiplied by, float32 ``[K]`` or, for stacked experts, ``[E, K]``.
        folded: modules whose factors are in the normalization before them.
        norms: name -> a normalization's weight or bias with factors in it.
        caches: module of an attention -> largest magnitude of keys and of values.
        alphas: module -> the exponents of AWQ that were chosen for what it is made of.
    """

    values: Mapping[str, LazyTensor] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, Array] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()
    norms: Mapping[str, LazyTensor] = field(default_factory=dict)
    caches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    alphas: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def factors_of(self, module: str, kind: DType) -> LazyTensor | None:
        """What a module's inputs are multiplied by, to be stored; None if they are not, or not by it."""
        found = None if module in self.folded else self.factors.get(module)
        return None if found is None else from_array(found).cast(kind)

    def scale_of(self, module: str, over: float, least: bool = False) -> float:
        """The scale of what goes into a module, whose codes end at ``over``.

        Args:
            module: one that is quantized.
            over: the largest code.
            least: do not let it be below 0.01, as NeMo does for a ``gpt``.

        Raises:
            UsageError: nothing went into it when the model was calibrated.
        """
        if module not in self.largest:
            raise _never_ran([module])
        return scale(self.largest[module], over, least)


def scale(largest: float, over: float, least: bool = False) -> float:
    """The largest magnitude over the largest code, in float32; 1 where there was nothing but zeros."""
    found = np.float32(largest) / np.float32(over) if largest else np.float32(1)
    return float(max(found, _LEAST_SCALE) if least else max(found, np.finfo(np.float32).tiny))


def calibrate_weights(
    weights: Mapping[str, LazyTensor],
    chosen: Iterable[str],
    statistics: Statistics,
    smoothing: Smoothing,
    *,
    alpha: float,
    together: Sequence[Sequence[str]],
    fold: bool = False,
) -> Calibration:
    """What calibration makes of weights under Hugging Face's names; nothing is read.

    Args:
        weights: all of them, as they are in the source.
        chosen: names of those that are quantized.
        statistics: of this model.
        smoothing: what moves into weights.
        alpha: of SmoothQuant.
        together: modules that become one when the model runs, or that share a normalization.
        fold: put the factors of modules that share one into the normalization before them.

    Raises:
        UsageError: a module never ran, or the statistics are none for this smoothing.
    """
    kind = dtype(statistics.computed_in)
    modules = [name.removesuffix(".weight") for name in chosen]
    missing = [name for name in modules if name not in statistics.modules]
    if missing:
        raise _never_ran(missing)
    largest = {name: float(statistics.modules[name].inputs.max(initial=0)) for name in modules}
    if not smoothing:
        return Calibration(largest=_of_groups(largest, together), caches=dict(statistics.caches))
    exact: dict[str, Array] = {}
    for name in modules:
        seen = statistics.modules[name]
        if smoothing == "awq" and statistics.group_size and weights[f"{name}.weight"].shape[-1] % statistics.group_size:
            raise groups_do_not_divide(f"{name}.weight", weights[f"{name}.weight"].shape[-1], statistics.group_size)
        exact[name] = smooth_factors(seen, alpha) if smoothing == "smoothquant" else awq_factors(seen, name)
    factors = {name: rounded(found, kind) for name, found in exact.items()}
    for name in modules:
        largest[name] = float((statistics.modules[name].inputs * factors[name]).max(initial=0))
    values = {f"{name}.weight": divided(weights[f"{name}.weight"], exact[name], kind) for name in modules}
    for group in together:
        several = [name for name in group if name in factors]
        if len(several) < 2:
            continue
        mean = mean_of([factors[name] for name in several], kind)
        for name in several:
            values[f"{name}.weight"] = exchanged(values[f"{name}.weight"], factors[name], mean, kind)
            factors[name] = mean
    norms, folded = _folded(weights, statistics, factors, kind) if fold else ({}, frozenset())
    alphas = {name: (found,) for name in modules if (found := statistics.modules[name].alpha) is not None}
    return Calibration(
        values,
        _of_groups(largest, together),
        factors,
        folded,
        norms,
        dict(statistics.caches),
        alphas if smoothing == "awq" else {},
    )


def groups_do_not_divide(name: str, columns: int, group: int) -> UsageError:
    """What is said where AWQ's groups do not divide a weight."""
    return UsageError(
        "groups do not divide the rows of a weight",
        tensor=name,
        expected=f"a multiple of {group} columns",
        found=f"{columns} columns",
        remedy="choose another --awq-block-size, or leave the module as it is with --quantize-exclude",
    )


def under_names(
    found: Calibration,
    sources: Mapping[str, Sequence[str]],
    rename: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]],
    weights: Mapping[str, LazyTensor],
    caches: Mapping[str, str],
) -> Calibration:
    """What calibration says, under another target's names.

    Args:
        found: under Hugging Face's names.
        sources: name of a target's weight -> the modules that it is made of, in Hugging Face's names.
        rename: makes the target's tensors of those under Hugging Face's names.
        weights: all of them under Hugging Face's names.
        caches: attention's module in Hugging Face's names -> in the target's.
    """
    modules = {name.removesuffix(".weight"): several for name, several in sources.items()}
    values: Mapping[str, LazyTensor] = {}
    if found.values:
        made = rename({**weights, **found.values})
        values = {name: made[name] for name in sources}
    return Calibration(
        values,
        {
            name: max(found.largest[one] for one in several)
            for name, several in modules.items()
            if all(one in found.largest for one in several)
        },
        {name: _one_of(name, [found.factors[one] for one in several]) for name, several in modules.items()}
        if found.factors
        else {},
        caches={caches[name]: pair for name, pair in found.caches.items() if name in caches},
        alphas={
            name: tuple(alpha for one in several for alpha in found.alphas.get(one, ()))
            for name, several in modules.items()
        },
    )


def _one_of(name: str, several: Sequence[Array]) -> Array:
    """The factors of modules that became one, which are the same."""
    first = several[0]
    if any(not np.array_equal(first, other) for other in several[1:]):
        raise UsageError(f"{name}: the modules that it is made of have factors of their own")
    return first


def _of_groups(largest: dict[str, float], together: Sequence[Sequence[str]]) -> dict[str, float]:
    """With the largest of all for modules that become one."""
    found = dict(largest)
    for group in together:
        several = [largest[name] for name in group if name in largest]
        found |= {name: max(several) for name in group if name in largest}
    return found


def _folded(
    weights: Mapping[str, LazyTensor], statistics: Statistics, factors: Mapping[str, Array], kind: DType
) -> tuple[dict[str, LazyTensor], frozenset[str]]:
    """Normalizations with the factors of those who share their output, if all of these are quantized."""
    norms: dict[str, LazyTensor] = {}
    folded: set[str] = set()
    for shared in statistics.shared:
        weight = weights.get(f"{shared.norm}.weight")
        if not shared.norm or weight is None or any(name not in factors for name in shared.modules):
            continue
        for end in ("weight", "bias"):
            name = f"{shared.norm}.{end}"
            if name in weights:
                norms[name] = times(weights[name], factors[shared.modules[0]], kind)
        folded.update(shared.modules)
    return norms, frozenset(folded)


def _never_ran(modules: Sequence[str]) -> UsageError:
    some = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return UsageError(
        f"nothing went into {some} when the model was calibrated",
        expected="statistics of every module that is quantized",
        remedy="calibrate with more text, or leave them as they are with --quantize-exclude",
    )
