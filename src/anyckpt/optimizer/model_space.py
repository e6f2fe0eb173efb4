"""State of Megatron-Core's distributed checkpoints whose tensors have the weights' names and shapes.

``optimizer.state.exp_avg.decoder.layers...``; masters are ``param`` (``fully_reshardable``, core 0.14 on) or
``fp32_param`` (``fully_sharded_model_space`` to 0.15, flattened and put together by the container's reader; and
``Float16Optimizer``).  Hyperparameters and steps are in the common state under ``optimizer``: one optimizer, or one by
number for dense layers and one for experts, whose tensors may be under ``chained_1.``.

Facts: ``sharded_state_dict`` of ``megatron/core/optimizer/{optimizer,distrib_optimizer}.py``, core 0.5 to 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import FormatError, MappingError
from anyckpt.indexing import Shape
from anyckpt.models.dialects import spellings
from anyckpt.optimizer.groups import assigned
from anyckpt.optimizer.original_groups import ORIGINAL_GROUPS, with_original_groups
from anyckpt.optimizer.state import MASTER, Slots, checked, options, same_step, unproved
from anyckpt.tensor import LazyTensor

_ENTRY = re.compile(
    r"(?:chained_\d+\.)?optimizer\.state\.(?P<slot>param|fp32_param|(?:max_)?exp_avg(?:_sq)?|momentum_buffer)\.(?P<name>.+)"
)
_MASTERS = ("param", "fp32_param")
_STACKED = re.compile(r"(?:.*\.)?(?:decoder|encoder)\.layers\.(?!\d)")
_EXPERTS = ".experts.experts."
_COMMON = ("optimizer", "optimizer_states")
"""Where the common state has what is not sharded: Megatron-Core's, and Lightning's name for it in NeMo 1."""


def has_model_space(checkpoint: Checkpoint) -> bool:
    """There is such state."""
    return any(_ENTRY.match(name) for name in checkpoint.tensors)


def read_model_space(checkpoint: Checkpoint) -> OptimizerState:
    """The state, by the names of ``checkpoint.weights()``.

    Raises:
        FormatError: the common state's ``optimizer`` is damaged.
        MappingError: a tensor is of no weight, or not of its shape.
    """
    weights = checkpoint.weights()
    slots: Slots = {}
    for name, tensor in checkpoint.tensors.items():
        found = _ENTRY.fullmatch(name)
        if found is None:
            continue
        slot = MASTER if found["slot"] in _MASTERS else found["slot"]
        if found["name"] in slots.setdefault(slot, {}):
            raise unproved(f"there are two tensors that are its {slot}", path=checkpoint.path, tensor=found["name"])
        slots[slot][found["name"]] = tensor
    slots = {slot: {name: own[name] for name in weights if name in own} | own for slot, own in slots.items()}
    parts = common_optimizers(checkpoint)
    groups = [group for part in parts for group in groups_of(part, checkpoint.path)]
    steps = [group.get("step") for group in groups]
    states = [part["state"] for part in map(inner, parts) if isinstance(part.get("state"), dict)]
    steps += [state.get(key) for state in states for key in ("common_step", "step")]
    state = OptimizerState(
        slots=slots,
        step=same_step(steps, checkpoint.path),
        groups=tuple(options(group) for group in groups),
        group_of=_grouped(checkpoint, slots, groups),
        grad_scaler=next((part["grad_scaler"] for part in parts if part.get("grad_scaler")), None),
    )
    return checked(with_original_groups(state, checkpoint.objects.get(ORIGINAL_GROUPS)), weights, checkpoint.path)


def common_optimizers(checkpoint: Checkpoint) -> list[Mapping[Any, Any]]:
    """The common state's optimizers: one, or those of a chain in order; none where it has none.

    Raises:
        FormatError: it is something else.
    """
    name = next((name for name in _COMMON if name in checkpoint.objects), None)
    if name is None:
        return []
    common = checkpoint.objects[name]
    if isinstance(common, dict) and common and all(type(key) is int for key in common):
        common = [common[key] for key in sorted(common)]
    found = common if isinstance(common, list) else [common]
    if not all(isinstance(part, dict) for part in found):
        raise FormatError("is not a dictionary", path=checkpoint.path, tensor=name, found=type(common).__name__)
    return found


def inner(part: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state of the optimizer that Megatron's own wraps."""
    wrapped = part.get("optimizer", part)
    return wrapped if isinstance(wrapped, dict) else {}


def groups_of(part: Mapping[Any, Any], path: str) -> list[Mapping[str, Any]]:
    """The parameter groups of one optimizer; none where they are kept elsewhere.

    Raises:
        FormatError: they are not a list of groups.
    """
    groups = inner(part).get("param_groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise FormatError("its param_groups are not a list of groups", path=path, tensor=_COMMON[0])
    return groups


def module_shapes(tensors: Mapping[str, LazyTensor]) -> dict[str, Shape]:
    """The shape that each parameter has in its module: without the axes along which layers and experts are stacked."""
    return {
        name: tensor.shape[(_STACKED.match(name) is not None) + (_EXPERTS in name) :]
        for name, tensor in tensors.items()
    }


def _grouped(checkpoint: Checkpoint, slots: Slots, groups: list[Mapping[str, Any]]) -> dict[str, int]:
    """The group of each parameter by Megatron's rule; empty where that does not tell."""
    tensors = {name: tensor for own in slots.values() for name, tensor in own.items()}
    try:
        told = groups and spellings.find_prefix(tensors) is not None
        return assigned(module_shapes(tensors), groups, checkpoint.path) if told else {}
    except MappingError:
        return {}
