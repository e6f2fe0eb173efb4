"""Laying state out as Lightning's ``.ckpt`` files keep it: PyTorch's own form, parameters by number.

Numbers count through the groups, in a group in the order of the state dict, which is that in which modules register
parameters.  For a model of transformers the state dict that the state came from tells it, or its family.  A model in
16 bits whose optimizer has fp32 masters gets NeMo 1's form (``megatron_amp_O2``), the only one that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.models.dialects.registration import registered_order
from anyckpt.optimizer.groups import assigned, effective
from anyckpt.optimizer.model_space import module_shapes
from anyckpt.optimizer.state import MASTER, own_state, parameters_of, unproved
from anyckpt.tensor import LazyTensor

_ROOT = "optimizer_states"
_HALF = ("float16", "bfloat16")
_OF_MODULES = ("hub", "nemo-flat")
"""Dialects whose names are those of modules of which the order is known; others stack layers."""

Path = tuple[str | int, ...]


def write_numbered(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with the state as ``optimizer_states`` of a Lightning checkpoint.

    Raises:
        MappingError: nothing tells which group a parameter is in, or in which order modules register parameters.
    """
    checkpoint = _in_order(checkpoint, state)
    weights = checkpoint.weights()
    trained = parameters_of(state)
    names = [name for name in weights if name in trained]
    groups = [effective(group) for group in state.groups] or [{}]
    group_of = state.group_of
    if not all(name in group_of for name in names):
        shapes = module_shapes({name: weights[name] for name in names})
        group_of = assigned(shapes, state.groups, checkpoint.path) if state.groups else dict.fromkeys(names, 0)
    members = [[name for name in names if group_of[name] == number] for number in range(len(groups))]
    tree = _tree(state, groups, members, weights)
    tensors, objects, paths, keys = _flat({_ROOT: [tree]})
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **tensors},
        objects={**{name: checkpoint.objects[name] for name in checkpoint.objects}, **objects},
        state_prefixes=(*checkpoint.state_prefixes, _ROOT),
        trainer=checkpoint.trainer or _lightning_entries(checkpoint),
        key_paths={**checkpoint.key_paths, **paths},
        original_keys={**checkpoint.original_keys, **keys},
    )


def _in_order(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with its weights in the order in which the model's modules register them."""
    place = {checkpoint.model_prefix + name: number for number, name in enumerate(state.order)}
    if all(checkpoint.model_prefix + name in place for name in parameters_of(state)):
        ordered = sorted(checkpoint.tensors, key=lambda name: place.get(name, len(place)))
        return replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in ordered})
    if checkpoint.registered_order:
        return checkpoint
    if checkpoint.dialect in _OF_MODULES:
        names = registered_order(checkpoint.tensors)
        return replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names})
    if checkpoint.dialect is not None:
        raise unproved(
            "the state is by number, and nothing tells in which order modules register parameters of these names",
            path=checkpoint.path,
            expected="state that was by number under these names before; or --names hub; or --to dcp, by name",
            found=f"{checkpoint.dialect} names, and "
            + (f"the order of {len(state.order)} other ones" if state.order else "no order"),
        )
    return checkpoint


def _lightning_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a Lightning checkpoint from another format has besides weights and state."""
    entries: dict[str, Any] = {"global_step": checkpoint.training.step or 0}
    if checkpoint.config_kind == "nemo1":
        entries.update(hparams_name="kwargs", hyper_parameters={"cfg": checkpoint.config})
    return entries


def _tree(
    state: OptimizerState, groups: list[dict[str, Any]], members: list[list[str]], weights: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    states: dict[int, dict[str, Any]] = {}
    param_groups: list[dict[str, Any]] = []
    count = 0
    for group, names in zip(groups, members, strict=True):
        for number, name in enumerate(names, count):
            own = own_state(state, name)
            if own:
                states[number] = own
        param_groups.append({**group, "params": list(range(count, count + len(names)))})
        count += len(names)
    tree: dict[str, Any] = {"state": states, "param_groups": param_groups}
    masters = state.slots.get(MASTER, {})
    if not any(weights[name].dtype.name in _HALF for name in masters):
        return tree
    lists = [[masters[name] for name in own if weights[name].dtype.name in _HALF] for own in members]
    scaler = {} if state.grad_scaler is None else {"grad_scaler": state.grad_scaler}
    return {"optimizer": tree, **scaler, "fp32_from_fp16_params": lists}


def _flat(
    tree: dict[str, Any],
) -> tuple[dict[str, LazyTensor], dict[str, Any], dict[str, Path], dict[Path, Any]]:
    """Tensors and objects by dotted name, the path of each, and the keys that are not strings."""
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    keys: dict[Path, Any] = {}
    todo: list[tuple[Path, Any]] = [((), tree)]
    while todo:
        path, value = todo.pop()
        name = ".".join(map(str, path))
        if isinstance(value, LazyTensor):
            tensors[name], paths[name] = value, path
        elif isinstance(value, dict) and value and path[-1:] not in (("param_groups",), ("grad_scaler",)):
            for key, child in reversed(value.items()):
                where = (*path, str(key))
                if not isinstance(key, str):
                    keys[where] = key
                todo.append((where, child))
        elif isinstance(value, list) and value and path[-1:] != ("param_groups",):
            todo.extend(((*path, index), child) for index, child in reversed(list(enumerate(value))))
        else:
            objects[name], paths[name] = value, path
    return tensors, objects, paths, keys
