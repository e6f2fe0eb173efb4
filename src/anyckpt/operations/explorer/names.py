"""What the names of tensors say of where they are: in which layer of which stack, and of which kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
_EXPERT = re.compile(r"experts\.(?:(?=\d)|.*\.(?:weight|bias)(?=\d))(\d{1,9})(?![^.])")
_FEWEST_LAYERS = 2


class Standing(NamedTuple):
    """Where a tensor stands.

    Attributes:
        stack: what its layer is one of, such as ``model.layers``; empty if it is in none.
        layer: its number, or None.
        kind: the name with ``*`` in place of the numbers of layer and expert.
    """

    stack: str
    layer: int | None
    kind: str


def standings(names: Iterable[str]) -> dict[str, Standing]:
    """Where each tensor stands.

    The first number of a name is that of a layer if some kind of tensor is in several layers of its stack.
    """
    told = {name: _standing(name) for name in names}
    layers: dict[tuple[str, str], set[int]] = {}
    for one in told.values():
        if one.layer is not None:
            layers.setdefault((one.stack, one.kind), set()).add(one.layer)
    stacks = {stack for (stack, _), numbers in layers.items() if len(numbers) >= _FEWEST_LAYERS}
    return {
        name: one if one.stack in stacks else Standing("", None, _without_experts(name)) for name, one in told.items()
    }


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor is of: ``experts.7.up_proj.weight``, ``experts.linear_fc1.weight7``."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def short(kind: str) -> str:
    """A kind of tensor within its stack, as an axis has room for it."""
    inside = kind.split(".*.", 1)[-1]
    return inside.removesuffix(".weight").replace("experts.*.", "experts.") or kind


def _standing(name: str) -> Standing:
    first = _NUMBER.search(name)
    expert = _EXPERT.search(name)
    if first is None or (expert is not None and expert.start(1) == first.start()) or first.start() == 0:
        return Standing("", None, _without_experts(name))
    kind = f"{name[: first.start()]}*{_without_experts(name[first.end() :])}"
    return Standing(name[: first.start() - 1], int(first[0]), kind)


def _without_experts(name: str) -> str:
    found = _EXPERT.search(name)
    return name if found is None else f"{name[: found.start(1)]}*{name[found.end(1) :]}"
