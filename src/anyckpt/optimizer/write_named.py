"""Laying state out by name, as ``torch.distributed.checkpoint.state_dict`` gives it and trainers save it.

``optim.state.<name>.exp_avg`` and ``optim.param_groups.<n>.<key>``, whose ``params`` are names; fp32 masters of 16-bit
weights are ``master_param``, as Megatron-FSDP calls them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.optimizer.groups import assigned, effective
from anyckpt.optimizer.model_space import module_shapes
from anyckpt.optimizer.state import MASTER, MOMENTS
from anyckpt.tensor import LazyTensor, from_array

_ROOT = "optim"
_MASTER = "master_param"


def write_named(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with the state by the weights' names.

    Raises:
        MappingError: nothing tells which group a parameter is in.
    """
    weights = checkpoint.weights()
    names = [name for name in weights if name in state.slots[MOMENTS[0]]]
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, Any] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for name in names:
        own = {slot: state.slots[slot][name] for slot in MOMENTS}
        if state.step is not None:
            own["step"] = from_array(np.array(state.step, np.float32))
        if name in state.slots.get(MASTER, {}):
            own[_MASTER] = state.slots[MASTER][name]
        for slot, tensor in own.items():
            paths[f"{_ROOT}.state.{name}.{slot}"] = (_ROOT, "state", name, slot)
            tensors[f"{_ROOT}.state.{name}.{slot}"] = tensor
    group_of = state.group_of
    if state.groups and not all(name in group_of for name in names):
        group_of = assigned(module_shapes({name: weights[name] for name in names}), state.groups, checkpoint.path)
    for number, group in enumerate(state.groups):
        listed = {**effective(group), "params": [name for name in names if group_of[name] == number]}
        for key, value in listed.items():
            paths[f"{_ROOT}.param_groups.{number}.{key}"] = (_ROOT, "param_groups", number, key)
            objects[f"{_ROOT}.param_groups.{number}.{key}"] = value
    known = checkpoint.details.get("key_paths") or {}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **tensors},
        objects={**{name: checkpoint.objects[name] for name in checkpoint.objects}, **objects},
        state_prefixes=(*checkpoint.state_prefixes, f"{_ROOT}."),
        details={**checkpoint.details, "key_paths": {**known, **paths}},
    )
