"""Nested training state: what its first keys say of what lies under them, and the nesting again of what was flat."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_states")
SCHEDULERS = ("scheduler", "lr_scheduler", "lr_schedulers", "opt_param_scheduler")
MODELS = ("model", "state_dict", "model_state_dict")


def prefixes(tensors: Collection[str], paths: Mapping[str, tuple[Any, ...]]) -> tuple[str, tuple[str, ...]]:
    """What precedes the names of a model's weights, and how those of training state begin.

    Args:
        tensors: names.
        paths: name -> keys that lead to it, where it is nested.
    """
    roots = {name: str(path[0]) for name, path in paths.items() if len(path) > 1}
    wrapped = {roots.get(name) for name in tensors}
    optimizer = sorted(set(roots.values()).intersection(OPTIMIZERS))
    return next((f"{root}." for root in MODELS if root in wrapped), ""), tuple(f"{root}." for root in optimizer)


def nested(
    objects: Mapping[str, Any],
    paths: Mapping[str, tuple[Any, ...]],
    original_keys: Mapping[tuple[Any, ...], Any],
    tuples: Collection[tuple[Any, ...]] = (),
) -> dict[str, Any]:
    """Objects by name in the dictionaries and lists that they were in.

    A list of which items are missing, because they were tensors, is a dictionary by index, as Megatron-Core makes it.

    Args:
        objects: by name.
        paths: name -> keys that lead to it, a list's indices as whole numbers; a name that is missing is at the root,
            and so is what is all that there is.
        original_keys: path -> key, where the key is not the path's last element.
        tuples: paths of what is a tuple and no list.
    """
    root = _Node()
    for name, value in objects.items():
        node, path = root, paths.get(name) or (name,)
        for depth, step in enumerate(path[:-1], 1):
            node = node.setdefault(_Step(step, original_keys.get(path[:depth], step)), _Node())
        node[_Step(path[-1], original_keys.get(path, path[-1]))] = value
    built: dict[str, Any] = _built(root, (), tuples)
    return built


class _Step(tuple[Any, Any]):
    """A step of a path, and the key that it stands for."""

    __slots__ = ()

    def __new__(cls, step: Any, key: Any) -> _Step:
        return super().__new__(cls, (step, key))


class _Node(dict[_Step, Any]):
    """A container, by steps."""


def _built(node: _Node, path: tuple[Any, ...], tuples: Collection[tuple[Any, ...]]) -> Any:
    made = {
        key: _built(inner, (*path, step), tuples) if isinstance(inner, _Node) else inner
        for (step, key), inner in node.items()
    }
    steps = [step for step, _ in node]
    if not steps or not all(type(step) is int for step in steps) or sorted(steps) != list(range(len(steps))):
        return made
    items = [made[index] for index in range(len(steps))]
    return tuple(items) if path in tuples else items
