"""Optimizers of Megatron-Core in a state, taken in the form that is asked for and given back what was loaded.

A distributed optimizer's own ``state_dict`` has no moments; what it stores it says by ``sharded_state_dict``, in one of
three forms (``megatron/core/optimizer/distrib_optimizer.py``, core 0.14 to 0.16):

- ``fully_reshardable``: tensors of the weights' names and shapes, which every layout loads;
- ``dp_reshardable``: each rank's own runs of the flat buffers, as they are in memory: nothing is gathered, and any
  data-parallel size loads them at the same tensor, pipeline and expert parallelism;
- ``dp_zero_gather_scatter``: the first data-parallel rank gathers the buffers and writes them as one object, for the
  same model parallelism again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError
from anyckpt.torch.live import LiveState
from anyckpt.torch.megatron.entities import has_entities
from anyckpt.torch.megatron.state import live_state, parts_of, state_to_fill
from anyckpt.torch.options import Options

FULLY, BY_RANK, GATHERED = "fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"
_CONTENT = "content_metadata"
_KIND = "distrib_optim_sharding_type"
_USUAL = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What Megatron-LM says besides of what it saves."""

_BUFFER = re.compile(r"(?:.*\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_\d+\.")
_OBJECT = re.compile(r"(?:.*\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.param_state/shard_.*")

Form = Callable[[], str]
"""Gives the form; asked only if there is such an optimizer."""


def form_asked_for(options: Options) -> str:
    """The form in which options want a distributed optimizer's state saved."""
    if not options.parallel_optimizer:
        return GATHERED
    return FULLY if options.reshardable_optimizer else BY_RANK


def form_stored(checkpoint: Checkpoint) -> str:
    """The form in which a checkpoint has it."""
    if any(_BUFFER.match(name) for name in checkpoint.tensors):
        return BY_RANK
    return GATHERED if any(_OBJECT.fullmatch(name) for name in checkpoint.objects) else FULLY


def is_optimizer(value: Any) -> bool:
    """Whether it is an optimizer of Megatron-Core, one or several in a chain."""
    known = ("sharded_state_dict", "state_dict", "load_state_dict", "step")
    return not isinstance(value, torch.nn.Module) and all(callable(getattr(value, name, None)) for name in known)


def live_state_of(state: Mapping[str, Any], form: Form) -> LiveState:
    """``state.live_state``, of a state in which there may be optimizers.

    Raises:
        UsageError: as there, or an optimizer cannot be asked for a form.
    """
    optimizers = _optimizers(state)
    return live_state(_sharded(state, optimizers, form(), is_loading=False) if optimizers else state)


def state_to_fill_of(state: Mapping[str, Any], options: Options, stored: Callable[[], Checkpoint]) -> LiveState:
    """``state.state_to_fill``, of a state in which there may be optimizers: they are given what was loaded, and stay.

    Args:
        state: changed when all is loaded.
        options: of the load.
        stored: gives the checkpoint.

    Raises:
        MappingError: it has an optimizer's state in a form that this layout cannot load.
        UsageError: as there, or an optimizer cannot be asked for a form.
    """
    optimizers = _optimizers(state)
    if not optimizers or not isinstance(state, MutableMapping):
        return state_to_fill(state, options.device)
    if options.load_optimizer:
        checkpoint = stored()
        form = form_stored(checkpoint)
        working = _sharded(state, optimizers, form, is_loading=True)
        _check_layout(working, optimizers, form, checkpoint)
    else:
        working = without_optimizers(state)
    live = state_to_fill(working, options.device)
    replace_all = live.replace_all
    assert replace_all is not None

    @torch.no_grad()
    def replace(common: Mapping[str, Any], lacking: Collection[str]) -> None:
        replace_all(common, lacking)
        for key, optimizer in optimizers.items():
            if options.load_optimizer and key in working:
                optimizer.load_state_dict(working[key])
        said = state.get(_CONTENT)
        state.clear()
        state.update({**working, **optimizers})
        if said is not None:
            state[_CONTENT] = said

    live.replace_all = replace
    return live


def without_optimizers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the optimizers, which are not asked for anything."""
    return {key: value for key, value in state.items() if not is_optimizer(value)}


def _optimizers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if is_optimizer(value)}


def _sharded(state: Mapping[str, Any], optimizers: Mapping[str, Any], form: str, *, is_loading: bool) -> dict[str, Any]:
    """The state with what the optimizers say of themselves in their place."""
    content = {**_USUAL, **(state.get(_CONTENT) or {}), _KIND: form}
    weights = {key: value for key, value in state.items() if has_entities({key: value})}
    working = {**state, _CONTENT: content}
    for key, optimizer in optimizers.items():
        chain = getattr(optimizer, "chained_optimizers", None) or [optimizer]
        if any("metadata" not in inspect.signature(one.sharded_state_dict).parameters for one in chain):
            raise UsageError(
                "this optimizer of Megatron-Core cannot be asked for a form of its state",
                tensor=str(key),
                expected="one of core 0.14 or newer",
                remedy="put optimizer.sharded_state_dict(model_state) into the state yourself",
            )
        working[key] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=content)
    return working


def _check_layout(working: Mapping[str, Any], optimizers: Mapping[str, Any], form: str, checkpoint: Checkpoint) -> None:
    """Raise where the state is of ranks' own buffers, and these are not the checkpoint's."""
    if form == FULLY:
        return
    parts = parts_of({key: working[key] for key in optimizers})
    stored = {found[1] for name in (*checkpoint.tensors, *checkpoint.objects) if (found := _group(name)) is not None}
    own = {found[1] for _, one in parts.sharded if (found := _group(str(one.key))) is not None}
    other = [
        one
        for one in parts.tensors()
        if one.key in checkpoint.tensors and tuple(one.global_shape) != tuple(checkpoint.tensors[one.key].shape)
    ]
    if not other and own <= stored:
        return
    if other:
        first, stored_shape = other[0], checkpoint.tensors[other[0].key].shape
        wanted, there = f"buffers of {list(first.global_shape)}", f"buffers of {list(stored_shape)}"
    else:
        wanted, there = f"model-parallel group {min(own)}", f"groups {sorted(stored)}"
    raise MappingError(
        f"has an optimizer's state as {form}, which only the model parallelism that saved it loads",
        path=checkpoint.path,
        tensor=str(other[0].key) if other else None,
        expected=wanted,
        found=there,
        remedy="resume at that layout, and save with reshardable_optimizer=True; or load_optimizer=False",
    )


def _group(name: str) -> re.Match[str] | None:
    return re.match(r"(?:.*\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.", name)
