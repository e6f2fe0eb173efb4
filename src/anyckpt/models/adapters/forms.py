"""The two forms of an adapter, canonical and fused, and what a framework with one rank and one scale needs of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.identity import ElementWise
from anyckpt.models.adapters.adapter import Adapter, LowRank, Target, all_equal, by_weight, is_zero
from anyckpt.models.adapters.layers import Layers, check_update
from anyckpt.tensor import Constant, LazyTensor, Mapped, concatenate


def separated(adapter: Adapter, layers: Layers) -> Adapter:
    """The canonical form: an update of all rows becomes one of each part, with ``down`` repeated; exact.

    Raises:
        MappingError: an update has other rows than the model's weight.
    """
    updates: dict[Target, LowRank] = {}
    for target, update in adapter.updates.items():
        split = None if target.part else layers.split(target.weight)
        if split is None:
            updates[target] = update
            continue
        operation, config = split
        check_update(target, update, layers)
        ups = operation.from_hub(update.up, config)
        lengths = [None] * len(ups) if update.magnitude is None else operation.from_hub(update.magnitude, config)
        biases = [None] * len(ups) if update.bias is None else operation.from_hub(update.bias, config)
        for part, up, magnitude, bias in zip(operation.parts, ups, lengths, biases, strict=True):
            updates[Target(target.weight, part)] = replace(update, up=up, magnitude=magnitude, bias=bias)
    return replace(adapter, updates=updates)


def fused(adapter: Adapter, layers: Layers) -> Adapter:
    """The fused form: updates of a weight's parts become one of all its rows.

    If all parts have the same ``down`` the rank stays; otherwise ``down`` is theirs one after the other and ``up`` has
    theirs on its diagonal, so that the rank is the sum of theirs (3r for a QKV, 2r for gate and up).  Exact.

    Raises:
        MappingError: an update has other rows than the model's weight.
        UsageError: parts cannot be one update: their scales or types differ, or only some of them have a magnitude.
    """
    updates: dict[Target, LowRank] = {}
    for weight, parts in by_weight(adapter).items():
        updates[Target(weight)] = parts[""] if "" in parts else _fuse(weight, parts, layers)
    return replace(adapter, updates=updates)


def _fuse(weight: str, parts: Mapping[str, LowRank], layers: Layers) -> LowRank:
    split = layers.split(weight, parts)
    assert split is not None
    operation, config = split
    first = next(iter(parts.values()))
    names = tuple(name for update in parts.values() for name in update.names)
    for part, update in parts.items():
        check_update(Target(weight, part), update, layers)
    if len({(u.up.dtype, u.down.dtype) for u in parts.values()}) > 1:
        raise UsageError(
            "parts of one fused adapter have different element types",
            tensor=weight,
            remedy="cast them with --dtype first",
        )
    magnitudes = [parts[part].magnitude if part in parts else None for part in operation.parts]
    if any(m is not None for m in magnitudes) and any(m is None for m in magnitudes):
        raise UsageError(
            "DoRA adapts only some of the parts of a fused weight, and the lengths of the others' rows are the base's",
            tensor=weight,
            expected=", ".join(operation.parts),
            found=", ".join(parts),
            remedy="merge it into the base with anyckpt merge-lora",
        )
    if any(update.bias is not None for update in parts.values()):
        raise UsageError(
            "Megatron's adapters have no bias", tensor=names[0], remedy="merge it into the base with anyckpt merge-lora"
        )
    scale = max(update.scale for update in parts.values())
    scaled = {part: scaled_to(update, scale, names[0]) for part, update in parts.items()}
    shared = len(parts) == len(operation.parts) and all_equal([update.down for update in parts.values()])
    width = first.rank if shared else sum(update.rank for update in parts.values())
    ups: list[LazyTensor] = []
    rows = [shape[0] for shape in operation.source_shapes(layers.instances[weight].shape, config)]
    at = 0
    for part, length in zip(operation.parts, rows, strict=True):
        up = scaled[part].up if part in scaled else Constant(first.up.dtype, (length, 0))
        ups.append(up if shared else _at_columns(up, at, width))
        at += up.shape[1]
    down = first.down if shared else concatenate([scaled[p].down for p in operation.parts if p in scaled], 0)
    lengths = [m for m in magnitudes if m is not None]
    magnitude = operation.to_hub(lengths, config) if lengths else None
    return LowRank(down, operation.to_hub(ups, config), scale, magnitude, names=names)


def _at_columns(up: LazyTensor, at: int, width: int) -> LazyTensor:
    """A matrix with columns of zeros before and behind it."""
    before = Constant(up.dtype, (up.shape[0], at))
    behind = Constant(up.dtype, (up.shape[0], width - at - up.shape[1]))
    return concatenate([before, up, behind], 1)


def of_one_rank(adapter: Adapter) -> tuple[Adapter, int, float]:
    """The adapter with one rank and one scale, as Megatron's single ``dim`` and ``alpha`` need; these two.

    Smaller ranks get rows and columns of zeros, so nothing changes.

    Raises:
        UsageError: scales differ, and by more than a power of two, which alone is exact.
    """
    rank = max((update.rank for update in adapter.updates.values()), default=0)
    scale = max((update.scale for update in adapter.updates.values()), default=1.0)
    updates = {}
    for target, update in adapter.updates.items():
        own = scaled_to(update, scale, (update.names or (str(target),))[0])
        updates[target] = replace(own, down=own.down.pad(0, rank), up=own.up.pad(1, rank))
    return replace(adapter, updates=updates), rank, scale * rank


def scaled_to(update: LowRank, scale: float, name: str) -> LowRank:
    """The same update with another scale.

    Raises:
        UsageError: the scales' ratio is no power of two, so values would be rounded.
    """
    if update.scale == scale or math.isclose(update.scale, scale, rel_tol=1e-12):
        return replace(update, scale=scale)
    ratio = update.scale / scale if scale else 0.0
    if abs(math.frexp(ratio)[0]) != 0.5 or update.up.dtype.numpy is None:
        raise UsageError(
            "the adapter's modules have different scales, and Megatron has one alpha and one rank for all",
            tensor=name,
            expected=f"{scale:g}, or that times a power of two",
            found=f"{update.scale:g}",
            remedy="merge it into the base with anyckpt merge-lora",
        )
    return replace(update, scale=scale, up=Mapped((update.up,), update.up.dtype, Times(ratio)))


@lru_cache
@dataclass(frozen=True)
class Times(ElementWise):
    """Numbers times ``ratio``, which must not need rounding."""

    ratio: float

    def __call__(self, array: np.ndarray) -> np.ndarray:
        wide = array.astype(np.float64) * self.ratio
        narrow = wide.astype(array.dtype)
        if not np.array_equal(narrow.astype(np.float64), wide):
            raise MappingError(
                "an adapter's values cannot be brought to the common scale without rounding",
                expected="values far from the smallest of their type",
                found=f"{array.dtype} times {self.ratio:g}",
                remedy="cast to float32 first with --dtype",
            )
        return narrow


def completed(adapter: Adapter, layers: Layers) -> tuple[Adapter, int]:
    """The adapter with an update of zeros for every part that is missing beside another part, and how many.

    The modules of NeMo and Megatron-Bridge that adapt parts of a weight have adapters for all of them.
    """
    updates: dict[Target, LowRank] = {}
    added = 0
    for weight, parts in by_weight(adapter).items():
        split = None if "" in parts else layers.split(weight, parts)
        if split is None:
            updates.update({Target(weight, part): update for part, update in parts.items()})
            continue
        operation, config = split
        like = next(iter(parts.values()))
        shapes = operation.source_shapes(layers.instances[weight].shape, config)
        for part, (rows, columns) in zip(operation.parts, shapes, strict=True):
            if part not in parts:
                added += 1
            updates[Target(weight, part)] = parts.get(part) or LowRank(
                Constant(like.down.dtype, (like.rank, columns)), Constant(like.up.dtype, (rows, like.rank)), like.scale
            )
    return replace(adapter, updates=updates), added


def without_empty(adapter: Adapter) -> tuple[Adapter, int]:
    """The adapter without updates of which both factors are zeros, and how many; reads the factors."""
    kept = {
        target: update
        for target, update in adapter.updates.items()
        if update.magnitude is not None or update.bias is not None or not (is_zero(update.down) and is_zero(update.up))
    }
    if not kept:
        return adapter, 0
    return replace(adapter, updates=kept), len(adapter.updates) - len(kept)
