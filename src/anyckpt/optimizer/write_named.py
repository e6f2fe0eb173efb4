"""Laying state out by name, as ``torch.distributed.checkpoint.state_dict`` gives it and trainers save it.

``optim.state.<name>.exp_avg`` and ``optim.param_groups.<n>.<key>``, whose ``params`` are names; fp32 masters of 16-bit
weights are ``master_param``, as Megatron-FSDP calls them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.optimizer.groups import assigned, effective
from anyckpt.optimizer.model_space import module_shapes
from anyckpt.optimizer.state import MASTER, own_state, parameters_of
from anyckpt.tensor import LazyTensor

_ROOT = "optim"
_MASTER = "master_param"


def write_named(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with the state by the weights' names.

    Raises:
        MappingError: nothing tells which group a parameter is in.
    """
    weights = checkpoint.weights()
    known = parameters_of(state)
    names = [name for name in weights if name in known]
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, Any] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for name in names:
        own = own_state(state, name)
        if name in state.slots.get(MASTER, {}) and weights[name].dtype.name != "float32":
            own[_MASTER] = state.slots[MASTER][name]
        for slot, value in own.items():
            paths[f"{_ROOT}.state.{name}.{slot}"] = (_ROOT, "state", name, slot)
            (tensors if isinstance(value, LazyTensor) else objects)[f"{_ROOT}.state.{name}.{slot}"] = value
    group_of = state.group_of
    if state.groups and not all(name in group_of for name in names):
        group_of = assigned(module_shapes({name: weights[name] for name in names}), state.groups, checkpoint.path)
    for number, group in enumerate(state.groups):
        listed = {**effective(group), "params": [name for name in names if group_of[name] == number]}
        for key, value in listed.items():
            paths[f"{_ROOT}.param_groups.{number}.{key}"] = (_ROOT, "param_groups", number, key)
            objects[f"{_ROOT}.param_groups.{number}.{key}"] = value
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **tensors},
        objects={**{name: checkpoint.objects[name] for name in checkpoint.objects}, **objects},
        state_prefixes=(*checkpoint.state_prefixes, f"{_ROOT}."),
        key_paths={**checkpoint.key_paths, **paths},
    )
