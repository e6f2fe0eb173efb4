"""State of Apex's ``DistributedFusedAdam`` in its first format: buckets, of which every rank keeps a part.

What is saved is either one rank's state, or every rank's as a torch file in a tensor of bytes (``gathered_states``).
A state has the rank's part of each bucket, and for each parameter its fragments: which run of the flattened parameter
is which run of which bucket.  Nothing is guessed; what fragments do not cover is an error.

Facts: ``_state_dict_v1``, ``StateBucket``, ``ParameterFragment`` and ``_bf16_rem_to_fp32`` of
``apex/contrib/optimizers/distributed_fused_adam.py``, 2022 to 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyckpt.containers.torch_file import read_torch
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import FormatError, LastingError
from anyckpt.indexing import Array
from anyckpt.optimizer.state import unproved
from anyckpt.pickling import Record
from anyckpt.tensor import LazyTensor, Mapped, Stored, concatenate, mosaic

REMAINDER = "remainder"
"""Slot of the low halves of fp32 weights whose high halves are the 16-bit parameters."""
_GATHERED = "gathered_states"
_BUCKETS = "buckets"
_BUCKET_CLASS = ".StateBucket"
_FRAGMENT_CLASS = ".ParameterFragment"
_SHARDS = {
    "param": "params_shard",
    REMAINDER: "param_remainders_shard",
    "exp_avg": "exp_avg_shard",
    "exp_avg_sq": "exp_avg_sq_shard",
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def has_buckets(state_dict: Any) -> bool:
    """It is such state."""
    if not isinstance(state_dict, Mapping):
        return False
    state = state_dict.get("state")
    return _GATHERED in state_dict or (isinstance(state, Mapping) and _BUCKETS in state)


def whole_states(state_dict: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """The state as PyTorch's optimizers have it: by number, each slot a tensor of one axis.

    Args:
        state_dict: what the optimizer was saved as.
        source: its file, for messages.

    Raises:
        FormatError: a rank's state is damaged.
        MappingError: a rank's part is missing, or fragments do not cover a parameter.
    """
    ranks = _ranks(state_dict, source)
    states = [_dictionary(rank.get("state"), "state", source) for rank in ranks]
    buckets = [_list(state.get(_BUCKETS), _BUCKETS, source) for state in states]
    if len({len(own) for own in buckets}) != 1:
        raise FormatError(
            "ranks have different numbers of buckets", path=source, found=", ".join(str(len(own)) for own in buckets)
        )
    whole = [_whole(own, number, source) for number, own in enumerate(zip(*buckets, strict=True))]
    result: dict[Any, Any] = {"step": states[0].get("step")}
    for index, one in states[0].items():
        if type(index) is not int:
            continue
        every = [_fields(f, _FRAGMENT_CLASS, source) for f in _list(_fragments(one), f"fragments of {index}", source)]
        # NeMo adds empty ones, so that a bucket of one element type waits for parameters of all others.
        fragments = [own for own in every if _range(own.get("param_range"), source)[0] < own["param_range"][1]]
        if not fragments:
            raise unproved(f"parameter {index} has no fragments", path=source)
        result[index] = {
            slot: _parameter(fragments, whole, index, slot, source)
            for slot in _SHARDS
            if all(slot in whole[number] for number in _bucket_numbers(fragments, len(whole), source))
        }
    return {"state": result, "param_groups": ranks[0].get("param_groups")}


def shaped(one: Mapping[str, LazyTensor], weight: LazyTensor) -> dict[str, LazyTensor]:
    """A parameter's slots, which are of one axis, in its shape, and ``param`` where the weight is of two halves."""
    slots = {slot: t.reshape(weight.shape) if t.size == weight.size else t for slot, t in one.items()}
    remainder = slots.pop(REMAINDER, None)
    if remainder is not None and remainder.shape == weight.shape and weight.dtype.name == "bfloat16":
        slots["param"] = with_remainder(weight, remainder)
    return slots


def with_remainder(weight: LazyTensor, remainder: LazyTensor) -> LazyTensor:
    """The fp32 weight of which a bfloat16 weight is the rounded high half and ``remainder`` (int16) the low one.

    Rounding half up carried into the high half where the low one, as a signed number, is negative.
    """
    return Mapped((weight, remainder), BY_NAME["float32"], _joined_halves)


def _joined_halves(high: Array, low: Array) -> Array:
    carried = high.view(np.int16).astype(np.int32) - (low < 0)
    return ((carried.astype(np.uint32) << 16) | low.view(np.uint16).astype(np.uint32)).view(np.float32)


def _ranks(state_dict: Mapping[Any, Any], source: str) -> list[Mapping[Any, Any]]:
    """Every rank's state, in the order of ranks."""
    if _GATHERED not in state_dict:
        return [state_dict]
    found = []
    for number, tensor in enumerate(_list(state_dict[_GATHERED], _GATHERED, source)):
        if not isinstance(tensor, Stored) or tensor.ndim != 1 or tensor.dtype.itemsize != 1 or tensor.strides:
            raise FormatError("a gathered state is no tensor of bytes", path=source, tensor=f"{_GATHERED}.{number}")
        file = tensor.source.slice(tensor.offset, tensor.size, f"{source} » {_GATHERED}.{number}")
        found.append(_dictionary(read_torch(file).root, f"{_GATHERED}.{number}", source))
    return found


def _whole(parts: Sequence[Any], number: int, source: str) -> dict[str, LazyTensor]:
    """Each slot of a bucket, all ranks' parts one after another."""
    fields = [_fields(part, _BUCKET_CLASS, source) for part in parts]
    whole: dict[str, LazyTensor] = {}
    for slot, key in _SHARDS.items():
        shards = [own.get(key) for own in fields]
        if all(shard is None for shard in shards) and slot not in _MOMENTS:
            continue
        flat = [shard for shard in shards if isinstance(shard, LazyTensor) and shard.ndim == 1]
        if len(flat) < len(shards):
            raise FormatError(f"bucket {number} has no {key}", path=source)
        try:
            whole[slot] = concatenate(flat, 0)
        except LastingError as error:
            raise FormatError(f"bucket {number}: its {key} {error.problem}", path=source) from None
    size = fields[0].get("bucket_size")
    held = whole[_MOMENTS[0]].size
    if type(size) is int and size != held:
        raise unproved(
            f"bucket {number} of Apex's DistributedFusedAdam is not whole: each data-parallel rank keeps a part",
            path=source,
            expected=f"{size} elements",
            found=f"{held} of {len(parts)} ranks",
        )
    return whole


def _parameter(
    fragments: Sequence[Mapping[Any, Any]],
    buckets: Sequence[Mapping[str, LazyTensor]],
    index: int,
    slot: str,
    source: str,
) -> LazyTensor:
    """A parameter's elements, put together from its fragments."""
    kind = buckets[fragments[0]["bucket_id"]][slot].dtype
    starts: list[list[int]] = []
    tiles: list[LazyTensor] = []
    for fragment in fragments:
        first, last = _range(fragment.get("param_range"), source)
        start, stop = _range(fragment.get("bucket_range"), source)
        bucket = buckets[fragment["bucket_id"]][slot]
        if last - first != stop - start or stop > bucket.size:
            raise unproved(
                f"a fragment of parameter {index} lies outside its bucket, of which only some ranks' parts are here",
                path=source,
                expected=f"elements {start} to {stop}",
                found=f"{bucket.size} elements",
            )
        if last > first:
            starts.append([first])
            tiles.append(bucket.narrow(0, start, stop - start))
    size = max((start[0] + tile.size for start, tile in zip(starts, tiles, strict=True)), default=0)
    try:
        return mosaic(kind, (size,), starts, tiles)
    except LastingError as error:
        raise unproved(
            f"the fragments of parameter {index} do not cover it: {error.problem}",
            path=source,
            tensor=slot,
            found=f"{len(tiles)} fragments",
        ) from None


def _bucket_numbers(fragments: Sequence[Mapping[Any, Any]], buckets: int, source: str) -> list[int]:
    numbers = [fragment.get("bucket_id") for fragment in fragments]
    if not all(type(number) is int and 0 <= number < buckets for number in numbers):
        raise FormatError("a fragment is of no bucket", path=source, found=str(numbers[:5]))
    return [number for number in numbers if type(number) is int]


def _fragments(one: Any) -> Any:
    return one.get("fragments") if isinstance(one, Mapping) else None


def _fields(value: Any, kind: str, source: str) -> Mapping[Any, Any]:
    """The attributes of an object of Apex's."""
    if not isinstance(value, Record) or not value.path.endswith(kind):
        raise FormatError(f"is not one of Apex's {kind[1:]}", path=source, found=type(value).__name__)
    return value.fields()


def _range(value: Any, source: str) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) == 2 and all(type(end) is int for end in value):
        first, last = value
        if 0 <= first <= last:
            return first, last
    raise FormatError("a fragment has no range", path=source, found=str(value)[:40])


def _dictionary(value: Any, what: str, source: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"its {what} is not a dictionary", path=source, found=type(value).__name__)
    return value


def _list(value: Any, what: str, source: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"its {what} is not a list", path=source, found=type(value).__name__)
    return value
