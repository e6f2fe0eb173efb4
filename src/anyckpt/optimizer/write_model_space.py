"""Laying state out as Megatron-Core's ``fully_reshardable``, which a distributed optimizer loads at every layout.

Groups are Megatron's own (matrices with weight decay, the rest without; experts apart), because Megatron-Core looks
its groups up by what they say of themselves.  The groups of another framework are kept beside them under a key that
Megatron-Core passes over, so that they are what they were when the checkpoint goes back.

Facts: ``DistributedOptimizer.{state_dict,load_state_dict}`` and ``ChainedOptimizer.sharded_state_dict`` of core 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.dtypes import dtype
from anyckpt.indexing import Shape
from anyckpt.optimizer.groups import Kind, decays, group_decays, is_edge
from anyckpt.optimizer.model_space import module_shapes
from anyckpt.optimizer.original_groups import original_groups
from anyckpt.optimizer.parameters import trained
from anyckpt.optimizer.state import MASTER, SLOTS, unproved, with_masters

_PREFIX = "optimizer."
_TYPE, _MASTER = "fully_reshardable", "param"
_TYPE_TO_015, _MASTER_TO_015 = "fully_sharded_model_space", "fp32_param"
"""What Megatron-Core until 0.15 has in place of it, where slots are the same arrays."""
_DISTRIBUTED = "its optimizer's state is for runs with --use-distributed-optimizer; megatron-lm's is for those without"
_FLOAT32 = dtype("float32")
_APART = "experts have an optimizer of their own, as in runs with expert parallelism; for one without it choose --ep 1"
_TOGETHER = "experts share the others' optimizer, as in runs without expert parallelism; for one with it choose --ep 2"


def write_model_space(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """The checkpoint with the state as Megatron-Core keeps it.

    Raises:
        MappingError: a parameter has no state, which Megatron-Core would ask for.
    """
    return _written(checkpoint, state, _TYPE, _MASTER)


def write_sharded_model_space(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    """As ``write_model_space``, for what Megatron-Core reads until 0.15 only.

    Raises:
        MappingError: a parameter has no state, which Megatron-Core would ask for.
    """
    return _written(checkpoint, state, _TYPE_TO_015, _MASTER_TO_015)


def _written(checkpoint: Checkpoint, state: OptimizerState, kind: str, master: str) -> Checkpoint:
    weights = checkpoint.weights()
    state = with_masters(state, weights)
    missing = [name for name in trained(weights) if name not in state.slots[MASTER]]
    if missing:
        raise unproved(
            "has no optimizer state, which Megatron-Core expects of every parameter",
            path=checkpoint.path,
            tensor=missing[0],
            found=f"{len(missing)} such weights",
        )
    tensors = {
        f"{_PREFIX}state.{master if slot == MASTER else slot}.{name}": tensor.cast(_FLOAT32)
        for slot in SLOTS
        for name, tensor in state.slots[slot].items()
    }
    chained = checkpoint.layout.expert_parallel > 1
    grouped = _by_kind(state, module_shapes(state.slots[MASTER]), experts_apart=chained)
    optimizers = [
        _optimizer([group for of, group in grouped.items() if of.expert == expert], state, kind)
        for expert in ((False, True) if chained and any(of.expert for of in grouped) else (False,))
    ]
    metadata = checkpoint.objects.get("content_metadata")
    common: dict[str, Any] = {
        "optimizer": optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers)),
        "content_metadata": {
            "singleton_local_shards": False,
            **(metadata if isinstance(metadata, dict) else {}),
            "distrib_optim_sharding_type": kind,
            "chained_optim_avoid_prefix": True,
        },
        **original_groups(state),
    }
    warnings = [*checkpoint.warnings, _DISTRIBUTED]
    if any(".experts." in name for name in state.slots[MASTER]):
        warnings.append(_APART if chained else _TOGETHER)
    names = [*(checkpoint.common or ()), *common]
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **tensors},
        objects={**objects, **common},
        state_prefixes=(*checkpoint.state_prefixes, _PREFIX),
        common=tuple(dict.fromkeys(names)),
        warnings=warnings,
    )


def _optimizer(groups: list[dict[str, Any]], state: OptimizerState, kind: str) -> dict[str, Any]:
    steps = {} if state.step is None else {"step": state.step}
    scaler = {} if state.grad_scaler is None else {"grad_scaler": state.grad_scaler}
    return {
        "optimizer": {"param_groups": [{**group, **steps} for group in groups]},
        **scaler,
        "param_state_sharding_type": kind,
    }


def _by_kind(state: OptimizerState, shapes: Mapping[str, Shape], *, experts_apart: bool) -> dict[Kind, dict[str, Any]]:
    """Megatron's groups in its order, each with the hyperparameters of the group that its parameters were in."""
    edges = any(group.get("is_decoupled_lr") for group in state.groups)
    found: dict[Kind, dict[str, Any]] = {}
    for name, shape in shapes.items():
        kind = Kind(decays(name, shape), experts_apart and ".experts." in name, edges and is_edge(name))
        if kind not in found:
            found[kind] = _hyperparameters(state, kind, name)
    return dict(sorted(found.items(), key=lambda item: (item[0].expert, not item[0].decays, item[0].edge)))


def _hyperparameters(state: OptimizerState, kind: Kind, name: str) -> dict[str, Any]:
    number = state.group_of.get(name)
    if number is None:
        alike = [
            index for index, group in enumerate(state.groups) if group_decays(group, state.groups) == kind.decays
        ] or list(range(len(state.groups)))
        number = min(
            alike,
            key=lambda index: (
                bool(state.groups[index].get("is_expert_parallel")) != kind.expert,
                bool(state.groups[index].get("is_decoupled_lr")) != kind.edge,
            ),
            default=None,
        )
    own = {} if number is None else state.groups[number]
    return {
        "lr_mult": 1.0,
        "default_config": True,
        **own,
        "wd_mult": own.get("wd_mult", own.get("pre_wd_mult", 1.0)) if kind.decays else 0.0,
        "is_expert_parallel": kind.expert,
        "is_decoupled_lr": kind.edge,
    }
