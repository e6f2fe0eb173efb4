"""Adding an adapter to its base model, in the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError
from anyckpt.identity import ElementWise
from anyckpt.models.adapters.adapter import Adapter, LowRank, Target, by_weight, is_zero
from anyckpt.models.adapters.layers import Layers, check_update
from anyckpt.models.adapters.low_rank import LowRankSum
from anyckpt.models.hub import Hub
from anyckpt.tensor import LazyTensor, Mapped

_COMPUTED = ("bfloat16", "float16", "float32", "float64")


def merged(
    hub: Hub, adapter: Adapter, *, scale: float = 1.0, cast: Callable[[str, LazyTensor], DType] | None = None
) -> Hub:
    """The model with the adapter in its weights; views, nothing is computed before it is read.

    Args:
        hub: the base model.
        adapter: made for it.
        scale: every update is multiplied by it, besides its own scale; DoRA's directions too, its lengths not.
        cast: element type that a changed weight gets, from its hub name and the weight; its own if None.

    Raises:
        MappingError: the adapter is of another model, or the base's weights are quantized.
    """
    layers = Layers(hub.model)
    tensors = dict(hub.tensors)
    for name, values in adapter.replaced.items():
        item = layers.instances[name]
        own = tensors[name].dtype if cast is None else cast(name, tensors[name])
        sources = [source.cast(own) for source in item.rule.operation.from_hub(tensors[name], item.config)]
        for number, value in values.items():
            sources[number] = value.cast(own)
        tensors[name] = item.rule.operation.to_hub(sources, item.config)
    for name, own_rows in adapter.rows.items():
        item = layers.instances[name]
        own = tensors[name].dtype if cast is None else cast(name, tensors[name])
        stored = item.rule.operation.from_hub(tensors[name], item.config)
        sources = [own_rows[n].put_into(s, own) if n in own_rows else s.cast(own) for n, s in enumerate(stored)]
        tensors[name] = item.rule.operation.to_hub(sources, item.config)
    for target, update in adapter.updates.items():
        check_update(target, update, layers)
    for weight, parts in by_weight(adapter).items():
        _add(tensors, weight, parts, layers, scale, cast)
    return replace(hub, tensors=tensors, notes=[*hub.notes, *adapter.notes])


def _add(
    tensors: dict[str, LazyTensor],
    weight: str,
    parts: Mapping[str, LowRank],
    layers: Layers,
    scale: float,
    cast: Callable[[str, LazyTensor], DType] | None,
) -> None:
    """Change a weight, and its bias if the adapter has one."""
    base = tensors[weight]
    check_computed(weight, base)
    target = base.dtype if cast is None else cast(weight, base)
    tensors[weight] = _changed(
        base, parts, layers, weight, lambda part, update: _sum(part, update, scale, target), target
    )
    if all(update.bias is None for update in parts.values()):
        return
    bias = weight.removesuffix("weight") + "bias"
    if bias not in tensors:
        raise no_bias(next(iter(parts.values())), bias)
    own = tensors[bias].dtype if cast is None else cast(bias, tensors[bias])

    def add(part: LazyTensor, update: LowRank) -> LazyTensor:
        if update.bias is None:
            return part
        return Mapped((part, update.bias), own, Plus(update.scale * scale, own))

    tensors[bias] = _changed(tensors[bias], parts, layers, weight, add, own)


def _changed(
    tensor: LazyTensor,
    parts: Mapping[str, LowRank],
    layers: Layers,
    weight: str,
    change: Callable[[LazyTensor, LowRank], LazyTensor],
    target: DType,
) -> LazyTensor:
    """A weight or bias with its parts, or all of it, changed."""
    if "" in parts:
        return change(tensor, parts[""])
    split = layers.split(weight, parts)
    assert split is not None  # check_update has found it
    operation, config = split
    pieces = [
        change(piece, parts[part]) if part in parts else piece.cast(target)
        for part, piece in zip(operation.parts, operation.from_hub(tensor, config), strict=True)
    ]
    return operation.to_hub(pieces, config)


def _sum(weight: LazyTensor, update: LowRank, scale: float, target: DType) -> LazyTensor:
    missing = weight.shape[0] - update.up.shape[0]  # rows that pad the vocabulary
    up = update.up.pad(0, weight.shape[0]) if missing else update.up
    if missing and update.magnitude is not None:
        raise MappingError("DoRA on a padded vocabulary is not supported", tensor=update.names[0])
    return LowRankSum(weight, up, update.down, update.scale * scale, update.magnitude, target)


def check_computed(name: str, weight: LazyTensor) -> None:
    """Raise MappingError unless a weight is of a type that an update can be added to."""
    if weight.dtype.name not in _COMPUTED:
        raise MappingError(
            "the base model's weight is of a type that no update can be added to",
            tensor=name,
            expected=", ".join(_COMPUTED),
            found=weight.dtype.name,
            remedy="dequantize the base model first",
        )


def no_bias(update: LowRank, bias: str) -> MappingError:
    """The error for a bias of an update whose weight has none, which would be called ``bias``."""
    return MappingError(
        "the adapter has a bias for a module without one",
        tensor=update.names[0],
        expected=bias,
        found="no such tensor in the base model",
    )


@dataclass(frozen=True)
class Plus(ElementWise):
    """``bias + scale * more`` in float32, rounded to ``target``."""

    scale: float
    target: DType

    def __call__(self, bias: np.ndarray, more: np.ndarray) -> np.ndarray:
        total: np.ndarray = bias.astype(np.float32) + more.astype(np.float32) * np.float32(self.scale)
        return total.astype(self.target.numpy)


def idle(adapter: Adapter) -> list[Target]:
    """Updates that change nothing because one factor is all zeros and there is no magnitude; reads the factors."""
    return [
        target
        for target, update in adapter.updates.items()
        if update.magnitude is None and update.bias is None and (is_zero(update.up) or is_zero(update.down))
    ]
