"""What a merge is asked to do: the models, the rule, and its numbers, which may differ by weight and layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import UsageError
from anyckpt.operations.steps.layer_stack import NUMBERED
from anyckpt.operations.steps.merge_rules import Linear, Rule, Updates, slerp
from anyckpt.operations.steps.merged_tensor import Merged, is_complex
from anyckpt.operations.steps.thinning import Sparsity, Whole, chance, largest
from anyckpt.operations.steps.weighted_mean import check_shares
from anyckpt.tensor import LazyTensor

METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "passthrough")
"""As mergekit calls them."""

OVER_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
"""Those that add what models have learned over a base."""

_OF_COMPLEX = ("linear", "task_arithmetic", "passthrough")

_SWITCHES = ("normalize", "rescale")
_LARGEST = float(np.finfo(np.float32).max)
"""Beyond it a number makes infinities of all weights of 16 bits."""
_BOUNDS = {"density": (0.0, 1.0, "numbers from 0 to 1")}

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSource:
    """A model to merge.

    Attributes:
        path: where it is.
        adapter: an adapter that is added to it first, or None.
        scale: the adapter is multiplied by it.
    """

    path: str
    adapter: str | None = None
    scale: float = 1.0

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


@dataclass(frozen=True)
class Stretch:
    """Layers of the output that are made of the same layers of some models.

    Attributes:
        models: their numbers; the base first if the method has one.
        layers: of each model the first layer and the one after the last; None for all.
        settings: numbers for each model.
        shared: numbers for all of them.
    """

    models: tuple[int, ...]
    layers: tuple[tuple[int, int], ...] | None = None
    settings: tuple[Settings, ...] = ()
    shared: Settings = field(default_factory=dict)

    def __len__(self) -> int:
        return 0 if self.layers is None else self.layers[0][1] - self.layers[0][0]


@dataclass(frozen=True)
class MergeRequest:
    """A merge.

    Attributes:
        models: all that take part.
        method: one of ``METHODS``.
        stretches: what the layers are made of, from the first on; one, for a merge of whole models.
        settings: numbers for all layers and models: ``weight``, ``density``, ``t``, ``normalize``, ``rescale``,
            ``lambda``, ``scale``.
        base: number of the model that others are compared with, or None.
        adapted: path of the model that adapters which stand alone are added to, or None.
        dtype: the type to write, or None.
        tokenizer: number of the model whose tokenizer goes along; the base's or the first one's if None.
        one_tokenizer: all tokenizers must be the same files.
        seed: of what is left to chance.
        required: ``weight`` and ``t`` must be said, as mergekit has it; otherwise they are 1 and one half.
    """

    models: tuple[ModelSource, ...]
    method: str
    stretches: tuple[Stretch, ...]
    settings: Settings = field(default_factory=dict)
    base: int | None = None
    adapted: str | None = None
    dtype: str | None = None
    tokenizer: int | None = None
    one_tokenizer: bool = False
    seed: int = 0
    required: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError("no such way to merge", expected=", ".join(METHODS), found=self.method)
        if self.method in OVER_BASE and self.base is None:
            raise UsageError(
                f"{self.method} adds what models have learned over their base", remedy="give the base with --base"
            )
        for stretch in self.stretches:
            self._check(len(stretch.models))

    def _check(self, count: int) -> None:
        least, most = {"slerp": (2, 2), "passthrough": (1, 1)}.get(self.method, (1, math.inf))
        if not least <= count <= most:
            wanted = f"{least}" if least == most else f"{least} or more"
            raise UsageError(f"{self.method} takes another number of models", expected=wanted, found=count)

    @property
    def leading(self) -> int:
        """Number of the model whose configuration and other files go along."""
        return self.stretches[0].models[0] if self.base is None else self.base


@dataclass(frozen=True)
class _Place:
    """Where a weight is: in which stretch, and how far from its first layer (0) to its last (1)."""

    stretch: int
    along: float


class Rules:
    """The rule of each weight.

    Args:
        request: the merge.
        names: of all weights, in the spelling by which filters find them.
        embedding: names that come before the layers.
        target: the type that a weight of a name is rounded to.
    """

    def __init__(
        self,
        request: MergeRequest,
        names: Iterable[str],
        embedding: Sequence[str],
        target: Callable[[str, LazyTensor], DType],
    ) -> None:
        self._request = request
        self._target = target
        self._before = frozenset(embedding)
        self._stacks: dict[str, int] = {}
        for name in names:
            if match := NUMBERED.match(name):
                self._stacks[match[1]] = max(self._stacks.get(match[1], 0), int(match[2]) + 1)

    def make(self, name: str, children: tuple[LazyTensor, ...]) -> LazyTensor:
        """What a weight becomes, rounded once.

        Raises:
            UsageError: a number is missing, or the elements are of a kind that the method has no rule for.
        """
        if self._request.method not in _OF_COMPLEX and any(is_complex(child.dtype) for child in children):
            raise UsageError(
                f"holds complex numbers, which {self._request.method} has no rule for",
                tensor=name,
                remedy="leave it out with --exclude",
            )
        rule, target = self._rule(name, children), self._target(name, children[0])
        if rule is not None and not is_complex(target) and any(is_complex(child.dtype) for child in children):
            raise UsageError(
                "holds complex numbers in some of the models only, and not in the one whose types are written",
                tensor=name,
                expected=target.name,
                found=", ".join(child.dtype.name for child in children),
                remedy="leave it out with --exclude",
            )
        return children[0] if rule is None else Merged(children, rule, target)

    def _rule(self, name: str, children: tuple[LazyTensor, ...]) -> Rule | None:
        """None for the first model's own elements."""
        request, place = self._request, self._place(name)

        def number(key: str, model: int | None, default: float | None) -> float:
            said = self._said(key, name, place, model)
            if said is None:
                if default is None or (request.required and key in ("weight", "t")):
                    raise UsageError(
                        f"{request.method} needs the parameter {key!r}", tensor=name, remedy="give it in the recipe"
                    )
                return default
            return float(said)

        def switch(key: str, default: bool) -> bool:
            said = self._said(key, name, place, None)
            return default if said is None else bool(said)

        count, method = len(children), request.method
        if method in OVER_BASE and count == 1:
            return None  # as mergekit has it: nothing is learned over the base
        if method == "passthrough":
            scale = number("scale", 0, 1.0)
            return None if scale == 1 else Linear((scale,))
        if method == "slerp":
            t = number("t", None, 0.5)
            if t in (0, 1) and children[0].dtype == children[1].dtype:
                return Linear((1.0 - t, t))
            return slerp(t, children[0], children[1])
        if method == "linear":
            weights = tuple(number("weight", model, 1.0) for model in range(count))
            if not switch("normalize", True):
                return Linear(weights)
            try:
                check_shares(weights)
            except UsageError as error:
                raise error.told_as(UsageError, tensor=name, remedy="or add them up with --no-normalize") from None
            return Linear(weights, math.fsum(weights))
        weights = tuple(number("weight", model, 1.0) for model in range(1, count))
        densities = tuple(number("density", model, 1.0) for model in range(1, count))
        thinned = self._thinned(name, children, densities, rescaled=switch("rescale", method.startswith("dare")))
        return Updates(
            weights,
            thinned,
            elected=method.endswith("ties"),
            normalized=switch("normalize", method == "ties"),
            scale=number("lambda", None, 1.0),
        )

    def _thinned(
        self, name: str, children: tuple[LazyTensor, ...], densities: Sequence[float], *, rescaled: bool
    ) -> tuple[Sparsity, ...]:
        method, base = self._request.method, children[0]
        if method == "task_arithmetic":
            return (Whole(),) * len(densities)
        if method == "ties":
            pairs = zip(children[1:], densities, strict=True)
            return tuple(largest(child, base, density, rescaled=rescaled) for child, density in pairs)
        return tuple(
            chance(self._request.seed, name, model, density, rescaled=rescaled)
            for model, density in enumerate(densities, 1)
        )

    def _place(self, name: str) -> _Place:
        stretches = self._request.stretches
        match = NUMBERED.match(name)
        if match is None:
            return _Place(0 if name in self._before else len(stretches) - 1, 0.0)
        layer = int(match[2])
        if len(stretches) == 1:
            return _Place(0, _along(layer, self._stacks.get(match[1], 1)))
        for number, stretch in enumerate(stretches):
            if layer < len(stretch):
                return _Place(number, _along(layer, len(stretch)))
            layer -= len(stretch)
        return _Place(len(stretches) - 1, 0.0)

    def _said(self, key: str, name: str, place: _Place, model: int | None) -> Any:
        stretch = self._request.stretches[place.stretch]
        own = stretch.settings[model] if model is not None and stretch.settings else {}
        for settings in (own, stretch.shared, self._request.settings):
            if key in settings:
                value = _evaluated(settings[key], name, place.along)
                if value is not None:
                    return value
        return None


def _along(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


def _evaluated(setting: Any, name: str, along: float) -> Any:
    """A number as mergekit's recipes write it: one, several along the layers, or those of the first fitting filter."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(value, Mapping) for value in setting):
        for case in setting:
            if case.get("filter") in (None, "*") or str(case["filter"]) in name:
                return _evaluated(case["value"], name, along)
        return None
    if all(isinstance(value, bool) for value in setting):
        return setting[int(along * (len(setting) - 1))]
    at = along * (len(setting) - 1)
    low = int(at)
    high = min(len(setting) - 1, low + 1)
    return (1 - (at - low)) * setting[low] + (at - low) * setting[high]


def check_setting(key: str, setting: Any, where: str) -> None:
    """Raise UsageError unless a setting is a number (a truth value for a switch), a list of them, or cases of these."""
    if isinstance(setting, Mapping):
        setting = [setting]
    values = setting if isinstance(setting, list) else [setting]
    if values and all(isinstance(value, Mapping) for value in values):
        for case in values:
            unknown = case.keys() - {"filter", "value"}
            if unknown or "value" not in case:
                raise UsageError(f"{where}: {key} has a case without 'filter' and 'value' alone", found=dict(case))
            check_setting(key, case["value"], where)
        return
    kinds = (bool,) if key in _SWITCHES else (int, float)
    if not values or not all(isinstance(v, kinds) and (key in _SWITCHES or not isinstance(v, bool)) for v in values):
        kind = "true or false" if key in _SWITCHES else "a number"
        raise UsageError(f"{where}: {key} is not possible", expected=f"{kind}, or a list of them", found=setting)
    if key not in _SWITCHES:
        least, most, told = _BOUNDS.get(key, (-_LARGEST, _LARGEST, "numbers that float32 can hold"))
        if not all(least <= value <= most for value in values):  # NaN is not, either
            raise UsageError(f"{where}: {key} is not possible", expected=told, found=setting)
