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


def nested(objects: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Objects by name in the dictionaries and lists that they were in; a list that has lost items is a dictionary.

    Args:
        objects: by name.
        paths: name -> keys that lead to it; a name that is missing is at the root.
    """
    root: dict[Any, Any] = {}
    for name, value in objects.items():
        inner = root
        *keys, last = paths.get(name, (name,))
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return {key: _with_lists(value) if isinstance(value, dict) else value for key, value in root.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(inner) for key, inner in value.items()}
    is_list = bool(made) and list(made) == list(range(len(made)))
    return list(made.values()) if is_list else made
