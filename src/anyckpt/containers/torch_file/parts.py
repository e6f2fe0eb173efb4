"""Torch files that are one rank's part of a model, and so are no model by themselves.

Facts: FSDP's sharded state dicts of torch 2.0 to 2.13; ``engine.py`` (``_get_zero_param_shapes``,
``_save_checkpoint``), ``zero/stage_1_and_2.py`` and ``zero/stage3.py`` of DeepSpeed 0.5 to 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Part
from anyckpt.containers.torch_file.distributed import SHARD, is_sharded_tensor, mesh_of
from anyckpt.containers.torch_file.flatten import Flat
from anyckpt.containers.torch_file.values import DistributedTensor
from anyckpt.errors import FormatError
from anyckpt.tensor import LazyTensor

_FOLDER = "open the folder that holds the files of all ranks"
_DEEPSPEED_FOLDER = "open the folder that holds the files of all ranks (global_stepN, or the one with 'latest')"


def part_of(path: str, root: Any, flat: Flat) -> Part | None:
    """Which part of a model a torch file is, None if its tensors are whole.

    Args:
        path: the file.
        root: what it holds.
        flat: the same as tables.
    """
    return _of_dtensors(path, flat.distributed) or _of_sharded_tensors(flat) or _of_deepspeed(root)


def _of_dtensors(path: str, distributed: Mapping[str, DistributedTensor]) -> Part | None:
    cut = {name: tensor for name, tensor in distributed.items() if is_cut(tensor, path, name)}
    if not cut:
        return None
    name, first = next(iter(cut.items()))
    try:
        place = mesh_of(first, path, name).place()
    except FormatError:
        place = "a mesh of ranks of unknown form"
    return Part(
        f"is one rank's part ({place}) and no whole model: {len(cut)} of its tensors are DTensors cut over ranks, such"
        f" as {name}, {first.local.shape} of {first.shape} by {', '.join(first.placements)}",
        _FOLDER,
    )


def is_cut(tensor: DistributedTensor, path: str, name: str) -> bool:
    """Whether the local part is less than the tensor, or not its value yet (``Partial``)."""
    if tensor.local.shape != tensor.shape:
        return True
    try:
        sizes = mesh_of(tensor, path, name).sizes
    except FormatError:
        return any(placement != "Replicate()" for placement in tensor.placements)
    return any(size > 1 and kind != "Replicate()" for size, kind in zip(sizes, tensor.placements, strict=True))


def _of_sharded_tensors(flat: Flat) -> Part | None:
    if SHARD not in flat.unpacked and not any(map(is_sharded_tensor, flat.objects.values())):
        return None
    return Part("is one rank's part and no whole model: it holds the rank's shards of ShardedTensors (FSDP)", _FOLDER)


def _of_deepspeed(root: Any) -> Part | None:
    """Files of DeepSpeed that hold the states of one rank: ZeRO's partitions, empty weights, or a model's slice."""
    if not isinstance(root, dict):
        return None
    optimizer = root.get("optimizer_state_dict")
    if isinstance(optimizer, dict) and ("zero_stage" in optimizer or "single_partition_of_fp32_groups" in optimizer):
        return Part(
            "is one rank's partition of a DeepSpeed ZeRO optimizer, whose float32 weights are cut over all ranks",
            _DEEPSPEED_FOLDER,
        )
    module, shapes = root.get("module"), root.get("param_shapes")
    if not isinstance(module, dict) or "ds_version" not in root:
        return None
    for name, shape in stated_shapes(shapes).items():
        weight = module.get(name)
        if isinstance(weight, LazyTensor) and weight.shape != shape:
            return Part(
                f"is one rank's file of DeepSpeed ZeRO-3, which keeps no weights: {name} is {weight.shape} in place of"
                f" {shape}, for they lie in the *_optim_states.pt of all ranks",
                _DEEPSPEED_FOLDER,
            )
    parallel = root.get("mp_world_size")
    if type(parallel) is int and parallel > 1:
        return Part(f"is one of the {parallel} model-parallel ranks' files of a DeepSpeed model", _DEEPSPEED_FOLDER)
    return None


def stated_shapes(groups: Any) -> dict[str, tuple[int, ...]]:
    """``param_shapes`` of DeepSpeed's model states: a dictionary for each group of parameters (one alone to 0.4)."""
    found: dict[str, tuple[int, ...]] = {}
    for group in groups if isinstance(groups, list) else [groups]:
        for name, shape in group.items() if isinstance(group, dict) else ():
            if type(name) is str and isinstance(shape, (tuple, list)) and all(type(n) is int and n >= 0 for n in shape):
                found[name] = tuple(shape)
    return found
