"""Which parameters are in which group of an optimizer that lists them by number only.

Every trainer divides parameters in two, those that weight decay applies to and the rest, and each by a rule of its own.
Names, counts and the shapes of the state tell which rule it was.

Facts: ``get_params_for_weight_decay_optimization`` of NeMo 1.0 to 2.2 (parameters of norm modules that it knows, and
biases, do not decay; from 1.20 on a bias is what ends so; decaying parameters of experts are a group of their own) and
``get_all_params_for_weight_decay_optimization`` (all decay); ``_get_param_groups`` of Megatron-Core.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from anyckpt.indexing import Shape

_NORM = re.compile(r"(?:.*\.)?[a-z0-9_]*(?:layer)?norm[a-z0-9_]*\.(?:weight|bias)")

Rule = Callable[[str, Shape], bool]
"""Whether weight decay applies to a parameter, by its name and shape."""


def _is_matrix(name: str, shape: Shape) -> bool:
    return len(shape) > 1 and not name.endswith(".bias")


def _is_no_norm(name: str, shape: Shape) -> bool:
    return len(shape) != 1 or _NORM.fullmatch(name) is None


def _is_no_bias(name: str, shape: Shape) -> bool:
    return name.rpartition(".")[2] != "bias"


def _ends_otherwise(name: str, shape: Shape) -> bool:
    return not name.endswith("bias")


_RULES: tuple[Rule, ...] = (
    _is_matrix,
    lambda name, shape: _is_no_norm(name, shape) and _is_no_bias(name, shape),
    lambda name, shape: _is_no_norm(name, shape) and _ends_otherwise(name, shape),
    _is_no_bias,  # norms of classes that the trainer does not know: Megatron-Core's, Transformer Engine's
    _ends_otherwise,
)


def possible_groups(
    shapes: Mapping[str, Shape], groups: Sequence[Mapping[str, Any]], entries: Sequence[Sequence[Shape | None]]
) -> list[list[list[str]]]:
    """The ways to deal parameters to groups by the rules of trainers that fit the counts and shapes of the state.

    Args:
        shapes: of all parameters, in the order in which modules register them.
        groups: their hyperparameters.
        entries: of each group, the shape of each parameter's state, or that of its elements in one axis; None where
            it has none.
    """
    if len(groups) == 1:
        ways = [[list(shapes)]]
    else:
        ways = []
        for rule in _RULES:
            way = _dealt(shapes, groups, rule)
            if way is not None and way not in ways:
                ways.append(way)
    return [way for way in ways if all(map(_fits, way, entries, [shapes] * len(groups)))]


def _dealt(shapes: Mapping[str, Shape], groups: Sequence[Mapping[str, Any]], rule: Rule) -> list[list[str]] | None:
    """The parameters of each group, None where nothing tells groups apart by this rule."""
    decaying = _decaying(groups)
    dealt: list[list[str]] = [[] for _ in groups]
    for name, shape in shapes.items():
        own = [number for number, decays in enumerate(decaying) if decays == rule(name, shape)]
        if len(own) > 1:
            own = [number for number in own if _of_experts(groups[number]) == (".experts." in name)]
        if len(own) != 1:
            return None
        dealt[own[0]].append(name)
    return dealt


def _decaying(groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether weight decay applies to each group; the last one's does not where all have the same."""
    factors = [
        next((group[key] for key in ("wd_mult", "pre_wd_mult", "weight_decay") if key in group), 1.0)
        for group in groups
    ]
    if len(set(map(str, factors))) == 1:
        return [*[True] * (len(groups) - 1), False]
    return [factor != 0 for factor in factors]


def _of_experts(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_expert") is True or group.get("is_expert_parallel") is True)


def _fits(names: Sequence[str], entries: Sequence[Shape | None], shapes: Mapping[str, Shape]) -> bool:
    return len(names) == len(entries) and all(
        entry is None or entry in (shapes[name], (prod(shapes[name]),))
        for name, entry in zip(names, entries, strict=True)
    )
