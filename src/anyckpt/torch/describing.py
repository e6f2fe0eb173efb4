"""A nested state dict of live tensors, described as the pieces and objects that this rank has.

Names are paths joined by dots, as ``torch.distributed.checkpoint`` makes them (torch >= 2.4): every mapping is
descended into, a list where it holds a tensor or a mapping, and anything else is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from anyckpt.errors import UsageError
from anyckpt.formats.shared import nesting
from anyckpt.torch.live import Index, LiveObject, LiveState, Path, Put
from anyckpt.torch.megatron.entities import has_entities
from anyckpt.torch.megatron.state import live_state, state_to_fill
from anyckpt.torch.tensor_kinds import KINDS, Found

_DEEPEST = 100


@torch.no_grad()
def described(state: Mapping[str, Any], *, to_fill: bool = False, device: Any = None) -> LiveState:
    """What this rank has of a nested state dict.

    What has ``state_dict`` and ``load_state_dict`` at the top (a module, an optimizer) is taken by the first and, when
    all is loaded, given to the second.  A state with sharded entities of Megatron-Core's is described by
    ``megatron.state``.

    Args:
        state: nested dictionaries and lists of tensors and objects.
        to_fill: it is loaded into, not saved.
        device: where memory is made for what is loaded and has none; the host's if None.

    Raises:
        UsageError: it is no mapping, two leaves have one name, or a tensor has no elements in memory that can be
            written.
    """
    if not isinstance(state, Mapping):
        raise UsageError(
            "there is no mapping of state to save or load",
            expected="a dictionary of tensors, objects and dictionaries by name",
            found=f"a {type(state).__name__}",
            remedy="give the state_dict() of a module",
        )
    if has_entities(state):
        return state_to_fill(state, device) if to_fill else live_state(state)
    live = LiveState()
    for key, value in state.items():
        put = _setter(state, key)
        if not isinstance(value, torch.Tensor) and hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            inner = value.state_dict()
            live.finish.append(_giver(value, inner))
            live.owners.append(str(key))
            if isinstance(value, torch.optim.Optimizer) or key in nesting.OPTIMIZERS:
                live.optimizers.add(str(key))
            value = inner
        _walk(live, (key,), value, put)
    return live


def _walk(live: LiveState, path: Path, value: Any, put: Put) -> None:
    for inner, leaf, replace in _leaves(path, value, put):
        name = ".".join(map(str, inner))
        found = _found(name, leaf, replace)
        if isinstance(found, LiveObject):
            live.objects.append(found)
            names = {found.name}
        else:
            live.pieces += found
            names = {piece.name for piece in found}
        if name in names and name in live.paths:
            raise UsageError(
                "two parts of the state have one name",
                tensor=name,
                found=f"{list(live.paths[name])} and {list(inner)}",
                remedy="rename one: names are the keys of the path, joined by dots",
            )
        for one in names:
            live.paths.setdefault(one, inner)


def _found(name: str, leaf: Any, put: Put) -> Found:
    for kind in KINDS:
        found = kind(name, leaf, put)
        if found is not None:
            return found
    return LiveObject(name, leaf, put)


def _leaves(path: Path, value: Any, put: Put) -> Iterator[tuple[Path, Any, Put]]:
    if len(path) > _DEEPEST:
        raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner, _setter(value, key))
    elif isinstance(value, list) and _is_descended(value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, Index(index)), inner, _setter(value, index))
    else:
        yield path, value, put


def _is_descended(values: list[Any], depth: int = 0) -> bool:
    """Whether torch's own traversal goes into a list rather than take it as a leaf."""
    if depth > _DEEPEST:
        raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
    return any(
        isinstance(inner, (Mapping, torch.Tensor)) or (isinstance(inner, list) and _is_descended(inner, depth + 1))
        for inner in values
    )


def _setter(container: Any, key: Any) -> Put:
    def put(value: Any) -> None:
        if not isinstance(container, (MutableMapping, list)):
            raise UsageError(
                "cannot be loaded into a container that does not change",
                tensor=str(key),
                found=f"a {type(container).__name__}",
                remedy="give a dictionary",
            )
        container[key] = value

    return put


def _giver(owner: Any, state: Any) -> Callable[[], None]:
    return lambda: owner.load_state_dict(state)
