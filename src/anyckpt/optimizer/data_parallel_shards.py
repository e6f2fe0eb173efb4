"""The distributed optimizer's state as Megatron-LM 22.12 to 23.05 saved it: a file for each data-parallel rank.

``mp_rank_00_003/optim.pt`` belongs to the model in ``mp_rank_00/model_rng.pt``, and has what the fourth
data-parallel rank trains: of each chunk's gradient buffer, in which the last registered parameter comes first, one
of as many equal parts as there are ranks, wherever parameters begin.  A file lists Adam's state by number and fp32
weights by group, as for whole parameters; in a group those that are fp32 themselves come first.

Facts: ``megatron/optimizer/distrib_optimizer.py`` and ``megatron/model/distributed.py`` of Megatron-LM 23.04.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.dtypes import BY_NAME
from anyckpt.optimizer.rank_parameters import Parameter, deal_out
from anyckpt.optimizer.state import unproved
from anyckpt.optimizer.stored import HALF
from anyckpt.tensor import LazyTensor, concatenate

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FLOAT32 = BY_NAME["float32"]

Pieces = dict[Parameter, list[dict[str, LazyTensor]]]


def join_shards(
    parameters: Sequence[Parameter], states: Sequence[Any], arguments: Mapping[str, Any], path: str
) -> dict[Parameter, dict[str, LazyTensor]]:
    """Each parameter's slots, put together from all data-parallel ranks.

    Args:
        parameters: of one rank's model, in the order in which modules register them.
        states: ``optimizer`` of each data-parallel rank's file, in the order of ranks.
        arguments: of the training run.
        path: the model's file, for messages.

    Raises:
        MappingError: counts or sizes do not prove which parameter a part is of.
    """
    in_fp32 = bool(arguments.get("accumulate_allreduce_grads_in_fp32"))
    buffers: dict[tuple[int, str], list[Parameter]] = {}
    for parameter in parameters:
        kind = _FLOAT32.name if in_fp32 else parameter.weight.dtype.name
        buffers.setdefault((parameter.chunk, kind), []).append(parameter)
    pieces: Pieces = {parameter: [] for parameter in parameters}
    for rank, state in enumerate(states):
        held: dict[Parameter, tuple[int, int]] = {}
        for own in buffers.values():
            held.update(_held(own, rank, len(states)))
        for parameter, slots in _slots(held, state, f"data-parallel rank {rank}", path).items():
            pieces[parameter].append(slots)
    return {parameter: _joined(parameter, own) for parameter, own in pieces.items()}


def _joined(parameter: Parameter, pieces: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    if not pieces:  # it has no elements
        return dict.fromkeys(("master", *_MOMENTS), parameter.weight.cast(_FLOAT32))
    return {
        slot: concatenate([piece[slot] for piece in pieces], 0).reshape(parameter.weight.shape)
        for slot in ("master", *_MOMENTS)
    }


def _held(parameters: Sequence[Parameter], rank: int, ranks: int) -> dict[Parameter, tuple[int, int]]:
    """Which elements of each parameter of a buffer a data-parallel rank has."""
    total = sum(parameter.weight.size for parameter in parameters)
    part = -(-total // ranks)
    first, last = rank * part, min(total, (rank + 1) * part)
    held: dict[Parameter, tuple[int, int]] = {}
    end = total
    for parameter in parameters:
        start = end - parameter.weight.size
        low, high = max(start, first), min(end, last)
        if low < high:
            held[parameter] = (low - start, high - start)
        end = start
    return held


def _slots(
    held: Mapping[Parameter, tuple[int, int]], state: Any, what: str, path: str
) -> dict[Parameter, dict[str, LazyTensor]]:
    """What one data-parallel rank's file has of each parameter."""
    container = state if isinstance(state, dict) else {}
    adam = container.get("optimizer")
    groups = adam.get("param_groups") if isinstance(adam, dict) else None
    moments = adam.get("state") if isinstance(adam, dict) else None
    masters = container.get("shard_fp32_from_float16_groups")
    if (
        not isinstance(groups, list)
        or not isinstance(moments, dict)
        or not isinstance(masters, list)
        or len(masters) != len(groups)
        or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    ):
        raise unproved(
            f"the optimizer's state of {what} is of a layout that is not understood",
            path=path,
            expected="'optimizer' and 'shard_fp32_from_float16_groups' of as many groups",
            found=", ".join(map(str, list(container)[:5])) or "nothing",
        )
    found: dict[Parameter, dict[str, LazyTensor]] = {}
    for group, mine, own in zip(groups, deal_out(list(held), groups, path), masters, strict=True):
        halves = [parameter for parameter in mine if parameter.weight.dtype.name in HALF]
        whole = [parameter for parameter in mine if parameter.weight.dtype.name not in HALF]
        if not isinstance(own, list) or len(own) != len(halves):
            raise unproved(
                f"the fp32 weights of {what} do not fit the model",
                path=path,
                expected=f"{len(halves)}, one for each parameter of 16 bits that it has a part of",
                found=len(own) if isinstance(own, list) else "none",
            )
        master = dict(zip(halves, own, strict=True))
        for index, parameter in zip(group["params"], [*whole, *halves], strict=True):
            first, last = held[parameter]
            one = moments.get(index) if type(index) is int else None
            weight = parameter.weight.reshape((parameter.weight.size,)).narrow(0, first, last - first)
            slots = {slot: one.get(slot) if isinstance(one, dict) else None for slot in _MOMENTS}
            slots["master"] = master.get(parameter, weight)
            found[parameter] = _checked(slots, parameter, last - first, what, path)
    return found


def _checked(slots: Mapping[str, Any], parameter: Parameter, size: int, what: str, path: str) -> dict[str, LazyTensor]:
    for slot, tensor in slots.items():
        if not isinstance(tensor, LazyTensor) or tensor.shape != (size,) or tensor.dtype != _FLOAT32:
            raise unproved(
                f"the optimizer's {slot} of {what} does not fit its parameter",
                path=path,
                tensor=parameter.name,
                expected=f"{size} elements of float32",
                found=f"{tensor.dtype.name} {tensor.shape}" if isinstance(tensor, LazyTensor) else "none",
            )
    return dict(slots)
