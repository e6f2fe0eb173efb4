"""A nested state dict of live tensors, described as the pieces and objects that this rank has.

Names are paths joined by dots, as ``torch.distributed.checkpoint`` makes them (torch >= 2.4): every mapping is
descended into, a list where it holds a tensor or a mapping, and anything else is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats.shared import nesting
from anyckpt.torch.live import Index, LiveObject, LiveState, Path, Put
from anyckpt.torch.megatron.entities import has_entities
from anyckpt.torch.megatron.optimizers import (
    FULLY,
    form_asked_for,
    live_state_of,
    state_to_fill_of,
    without_optimizers,
)
from anyckpt.torch.options import DEFAULTS, Options
from anyckpt.torch.tensor_kinds import KINDS, Found, of_tensor

_DEEPEST = 100
_WHOLE = (torch.Tensor, torch.nn.Parameter)
"""Types that are nothing but tensors; what is of another one is asked for."""


@torch.no_grad()
def described(state: Mapping[str, Any], options: Options = DEFAULTS) -> LiveState:
    """What this rank has of a nested state dict, to be saved.

    What has ``state_dict`` and ``load_state_dict`` at the top (a module, an optimizer) is taken by the first.  A state
    with sharded entities of Megatron-Core's is described by ``megatron.state``, and optimizers in it by
    ``megatron.optimizers``.

    Args:
        state: nested dictionaries and lists of tensors and objects.
        options: of the save.

    Raises:
        UsageError: it is no mapping, two leaves have one name, or a tensor has no elements in memory.
    """
    check_mapping(state)
    if not has_entities(state):
        return _plain(state)
    if not options.save_optimizer:
        return live_state_of(without_optimizers(state), lambda: FULLY)
    return live_state_of(state, lambda: form_asked_for(options))


@torch.no_grad()
def to_be_filled(state: Mapping[str, Any], options: Options, stored: Callable[[], Checkpoint]) -> LiveState:
    """What this rank has of a nested state dict, to be loaded into.

    What was taken by ``state_dict`` is given to ``load_state_dict`` when all is loaded.

    Args:
        state: as for ``described``.
        options: of the load.
        stored: gives the checkpoint.

    Raises:
        MappingError: the checkpoint has the state of an optimizer of Megatron-Core for another layout alone.
        UsageError: as ``described``, or a tensor's memory cannot be written.
    """
    check_mapping(state)
    if not has_entities(state):
        return _plain(state)
    return state_to_fill_of(state, options, stored)


def check_mapping(state: Any) -> None:
    """Raise UsageError if a state is none."""
    if not isinstance(state, Mapping):
        raise UsageError(
            "there is no mapping of state to save or load",
            expected="a dictionary of tensors, objects and dictionaries by name",
            found=f"a {type(state).__name__}",
            remedy="give the state_dict() of a module",
        )


def _plain(state: Mapping[str, Any]) -> LiveState:
    """Of a state without entities."""
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
        names: Collection[str]
        if isinstance(found, LiveObject):
            live.objects.append(found)
            names = (found.name,)
        else:
            live.pieces += found
            names = (found[0].name,) if len(found) == 1 else {piece.name for piece in found}
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
    for kind in (of_tensor,) if type(leaf) in _WHOLE else KINDS:
        found = kind(name, leaf, put)
        if found is not None:
            return found
    return LiveObject(name, leaf, put)


def _leaves(path: Path, value: Any, put: Put) -> Iterator[tuple[Path, Any, Put]]:
    if len(path) > _DEEPEST:
        raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
    if isinstance(value, torch.Tensor):
        yield path, value, put
    elif isinstance(value, Mapping) and value:
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
