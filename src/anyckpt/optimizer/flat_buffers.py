"""State of Megatron-Core's distributed checkpoints that is kept in the distributed optimizer's flat buffers.

``dp_reshardable`` stores each bucket as a tensor of one axis (``optimizer.distributed.dp_group_idx_0.gbuf_idx_0.
dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg``), ``dp_zero_gather_scatter`` whole buffers in an object
``optimizer.distributed.dp_group_idx_0.param_state/shard_0_1``.  Neither has the padding at the buckets' ends, but for
the latter in core 0.6, which says how much it is.  A group's number tells whose state it is: pipeline stage and tensor
rank of dense parameters; stage, expert rank and expert tensor rank of experts.  See ``placing`` for where parameters
lie, and ``local_models`` for the parameters of a rank.

Facts: ``sharded_param_state_dp_reshardable`` and ``sharded_param_state_dp_zero`` of
``megatron/core/optimizer/distrib_optimizer.py``, core 0.7 to 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, MappingError
from anyckpt.optimizer.flat_state import flat_buffers
from anyckpt.optimizer.groups import assigned
from anyckpt.optimizer.local_models import LocalModels, Order, Rank
from anyckpt.optimizer.model_space import common_optimizers, groups_of, module_shapes
from anyckpt.optimizer.placing import Buffer, Start, placed
from anyckpt.optimizer.state import MASTER, MOMENTS, checked, options, same_step, unproved
from anyckpt.tensor import LazyTensor

_GROUP = r"(?:chained_(?P<optimizer>\d{1,3})\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d{1,9})\."
_BUCKET = re.compile(
    _GROUP + r"gbuf_idx_(?P<buffer>\d{1,6})\.dtype_(?P<types>\(.+\))\.bucket_idx_(?P<bucket>\d{1,6})\."
    r"(?P<slot>param|exp_avg|exp_avg_sq)"
)
_OBJECT = re.compile(_GROUP + r"(?P<kind>optimizer|param_state)/shard_[\d._]+")
_SLOTS = {"param": MASTER, **{slot: slot for slot in MOMENTS}}


@dataclass
class _Group:
    """What the ranks of one place in the model keep of one optimizer: buffers by number, and parameter groups."""

    buffers: dict[int, Buffer] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()


_Found = dict[Rank, dict[str, dict[str, LazyTensor]]]  # of every rank, slot -> name -> tensor
_Starts = dict[tuple[int, int, int], dict[str, Start]]  # of every optimizer, group and buffer


def has_flat_buffers(checkpoint: Checkpoint) -> bool:
    """There is such state."""
    objects = (_OBJECT.fullmatch(name) for name in checkpoint.objects)
    return any(_BUCKET.fullmatch(name) for name in checkpoint.tensors) or any(
        found is not None and found["kind"] == "param_state" for found in objects
    )


def read_flat_buffers(checkpoint: Checkpoint) -> OptimizerState:
    """The state, by the names of ``checkpoint.weights()``.

    Raises:
        FormatError: the state is damaged.
        MappingError: the layout of the run is unknown, or no order of parameters, or more than one, fits the buffers.
    """
    optimizers = _optimizers(checkpoint)
    firsts = [next(iter(own.values())) for own in optimizers.values()]
    experts = [number for number, first in zip(optimizers, firsts, strict=True) if _of_experts(first)]
    models = LocalModels(checkpoint, expert_groups=len(optimizers[experts[0]]) if experts else None)
    fitting: list[tuple[_Starts, _Found]] = []
    failures: list[MappingError] = []
    for order in models.orders():
        try:
            starts, found = _read_in(order, optimizers, models, experts, checkpoint.path)
        except MappingError as error:
            failures.append(error)
            continue
        if all(starts != other for other, _ in fitting):
            fitting.append((starts, found))
    if not fitting:
        raise failures[0]
    if len(fitting) > 1:
        raise unproved(
            "nothing tells the order of the parameters in the distributed optimizer's buffers",
            path=checkpoint.path,
            expected="transformer_impl and moe_grouped_gemm among the arguments",
            found=f"{len(fitting)} orders that fit",
        )
    found = fitting[0][1]
    slots = {
        slot: models.joined({rank: own.get(slot, {}) for rank, own in found.items()})
        for slot in dict.fromkeys(slot for own in found.values() for slot in own)
    }
    groups = [group for first in firsts for group in first.groups]
    weights = checkpoint.weights()
    shapes = module_shapes({name: weights[name] for own in slots.values() for name in own})
    state = OptimizerState(
        slots=slots,
        step=same_step([group.get("step") for group in groups], checkpoint.path),
        groups=tuple(options(group) for group in groups),
        group_of=assigned(shapes, groups, checkpoint.path),
        grad_scaler=next((p["grad_scaler"] for p in common_optimizers(checkpoint) if p.get("grad_scaler")), None),
    )
    return checked(state, weights, checkpoint.path)


def _of_experts(group: _Group) -> bool:
    return any(options.get("is_expert_parallel") for options in group.groups)


def _read_in(
    order: Order,
    optimizers: Mapping[int, Mapping[int, _Group]],
    models: LocalModels,
    experts: Sequence[int],
    path: str,
) -> tuple[_Starts, _Found]:
    """Where parameters lie if modules registered them in this order, and every rank's state."""
    starts: _Starts = {}
    found: _Found = {}
    for number, own in optimizers.items():
        of_experts = number in experts
        for rank in models.ranks:
            group = models.group(rank, of_experts=of_experts)
            held = own.get(group)
            if held is None:
                raise unproved(
                    "the distributed optimizer has not the groups of the model's layout",
                    path=path,
                    expected=f"dp_group_idx_{group}",
                    found=f"{len(own)} groups",
                )
            expected = list(models.buffers(rank, order, of_experts=of_experts if experts else None))
            if [dtype for dtype, _ in expected] != [buffer.dtype for _, buffer in sorted(held.buffers.items())]:
                raise unproved(
                    "the distributed optimizer's buffers are not of the model's chunks and element types",
                    path=path,
                    expected=", ".join(dtype for dtype, _ in expected) or "none",
                    found=", ".join(buffer.dtype for buffer in held.buffers.values()) or "none",
                )
            for (index, buffer), (_, parameters) in zip(sorted(held.buffers.items()), expected, strict=True):
                where = placed(buffer, parameters, models.shared, f"buffer {index} of group {group}", path)
                starts[number, group, index] = where
                mine = found.setdefault(rank, {})
                for slot in _SLOTS.values():
                    mine.setdefault(slot, {}).update(buffer.cut(slot, where, parameters))
        surplus = own.keys() - {models.group(rank, of_experts=of_experts) for rank in models.ranks}
        if surplus:
            raise unproved(
                "the distributed optimizer has more groups than the model's layout",
                path=path,
                expected=f"{len(own) - len(surplus)} groups",
                found=len(own),
            )
    return starts, found


def _optimizers(checkpoint: Checkpoint) -> dict[int, dict[int, _Group]]:
    """Number of the optimizer in the chain -> number of the group -> what it keeps."""
    optimizers: dict[int, dict[int, _Group]] = {}

    def group(found: re.Match[str]) -> _Group:
        own = optimizers.setdefault(int(found["optimizer"] or 0), {})
        return own.setdefault(int(found["group"]), _Group())

    for name, tensor in checkpoint.tensors.items():
        found = _BUCKET.fullmatch(name)
        if found is None:
            continue
        if tensor.ndim != 1:
            raise FormatError("a bucket has one axis", path=checkpoint.path, tensor=name, found=tensor.shape)
        buffer = group(found).buffers.setdefault(int(found["buffer"]), Buffer(found["types"], {}, divided=True))
        buffer.buckets.setdefault(_SLOTS[found["slot"]], {})[int(found["bucket"])] = tensor
    for name in checkpoint.objects:
        found = _OBJECT.fullmatch(name)
        if found is None:
            continue
        value = checkpoint.objects[name]
        if not isinstance(value, dict):
            raise FormatError("is not a dictionary", path=checkpoint.path, tensor=name, found=type(value).__name__)
        if found["kind"] == "optimizer":
            group(found).groups = groups_of(value, checkpoint.path)
        else:
            group(found).buffers.update(_gathered(value, name, checkpoint.path))
    for own in optimizers.values():
        if not all(held.groups and held.buffers for held in own.values()):
            raise FormatError("a group of the distributed optimizer has no parameter groups", path=checkpoint.path)
    return dict(sorted(optimizers.items()))


def _gathered(state: Mapping[Any, Any], name: str, path: str) -> Iterator[tuple[int, Buffer]]:
    """The buffers of an object that has them whole: coalesced since core 0.7, bucket by bucket before."""
    for number, flat in enumerate(flat_buffers(state, f"{path} » {name}")):
        if not flat.coalesced and (flat.unpadded is None or flat.of_gradients):
            raise unproved(
                "the buckets of the distributed optimizer are padded, and it does not say by how much",
                path=path,
                tensor=name,
                expected="per_bucket_numel_unpadded, as since core 0.6",
                found=f"{len(flat.sizes)} buckets of gradients' type {flat.kind}",
            )
        sizes = flat.sizes if flat.coalesced else flat.unpadded or ()
        buckets = {
            slot: {index: own[index].narrow(0, 0, size) for index, size in enumerate(sizes)}
            for slot, own in flat.slots.items()
        }
        yield number, Buffer(f"(torch.{flat.kind})", buckets, divided=not flat.coalesced)
