"""An adapter in the hub: low-rank updates of the hub's weights, whatever wrote them.

An update belongs to a weight of the hub (``decoder.layers.3.self_attention.linear_qkv.weight``), and either to all of
its rows, which are then in the hub's order (Megatron's fused form), or to one of its parts, rows as Hugging Face has
them (the canonical form): ``q``, ``k``, ``v`` of a fused QKV, ``gate`` and ``up`` of a gated MLP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from anyckpt.config.model import ModelConfig
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, UsageError
from anyckpt.identity import ElementWise
from anyckpt.models.hub import Model
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV, Operation
from anyckpt.models.language.rules import Instance
from anyckpt.tensor import Constant, LazyTensor, Mapped, concatenate

_SPLIT: tuple[tuple[re.Pattern[str], Operation, Callable[[ModelConfig], bool]], ...] = (
    (re.compile(r".*\.self_attention\.linear_qkv\.weight"), INTERLEAVED_QKV, lambda config: True),
    (re.compile(r".*\.linear_fc1\.weight\d*"), GATE_UP, lambda config: config.gated_linear_unit),
)
"""Which weights have parts that Megatron-Bridge's ``CanonicalLoRA`` adapts one by one, and how rows go together."""

_SHOWN = 8


class Target(NamedTuple):
    """What an update changes: a weight of the hub, and a part of its rows (empty for all of them)."""

    weight: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.weight} ({self.part})" if self.part else self.weight


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down``.

    Attributes:
        down: (rank, in), LoRA's A.
        up: (out, rank), LoRA's B.
        scale: alpha over rank, or over its square root.
        magnitude: (out,), DoRA's lengths of rows; None for plain LoRA.
        bias: (out,), LoRA's own bias of B; None mostly.
        names: as stored, for messages.
    """

    down: LazyTensor
    up: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None
    names: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Rows:
    """Rows that take the place of a matrix's.

    Attributes:
        indices: which.
        values: (indices, width), in their order.
        name: as stored, for messages.
    """

    indices: tuple[int, ...]
    values: LazyTensor
    name: str

    def put_into(self, matrix: LazyTensor, target: DType) -> LazyTensor:
        """The matrix with these rows, cast.

        Raises:
            MappingError: it has another width, or not all of the rows.
        """
        if self.values.ndim != 2 or matrix.ndim != 2 or self.values.shape[1] != matrix.shape[1]:
            raise MappingError(
                "trained rows have another width than the base model's",
                tensor=self.name,
                expected=matrix.shape[1:],
                found=self.values.shape,
            )
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        if len(set(self.indices)) != len(self.indices) or len(self.indices) != self.values.shape[0]:
            raise MappingError(
                "the adapter's settings and tensors contradict each other on the trained tokens",
                tensor=self.name,
                expected=f"{self.values.shape[0]} different tokens",
                found=f"{len(set(self.indices))}",
            )
        if self.indices and not 0 <= self.indices[order[0]] <= self.indices[order[-1]] < matrix.shape[0]:
            raise MappingError(
                "trains tokens that the base model does not have",
                tensor=self.name,
                expected=f"tokens below {matrix.shape[0]}",
                found=str(self.indices[order[-1]]),
                remedy="resize the base model's vocabulary as it was resized for training",
            )
        pieces: list[LazyTensor] = []
        at = 0
        for number in order:
            row = self.indices[number]
            pieces += [matrix.narrow(0, at, row - at).cast(target), self.values.narrow(0, number, 1).cast(target)]
            at = row + 1
        pieces.append(matrix.narrow(0, at, matrix.shape[0] - at).cast(target))
        return concatenate([piece for piece in pieces if piece.shape[0]], 0)


@dataclass
class Adapter:
    """Everything that an adapter changes.

    Attributes:
        updates: by what they change, in stored order.
        replaced: what takes the place of whole tensors of the base (PEFT's ``modules_to_save``, trained biases): hub
            name -> which of its rule's sources -> the family's own tensor.
        rows: what takes the place of single rows (PEFT's trainable tokens), in the same way.
        notes: what a user should know.
    """

    updates: dict[Target, LowRank]
    replaced: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    rows: dict[str, dict[int, Rows]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Layers:
    """The weights of a model, for adapters.

    Args:
        model: the model that adapters belong to.

    Attributes:
        instances: the rules of its tensors, by hub name.
        by_sources: the same by the family's own names.
        outer: first parts of the family's names, each with its dot.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.instances: dict[str, Instance] = {item.hub: item for item in model.definition.expected(model.config)}
        names = (source for item in self.instances.values() for source in item.sources)
        self.by_sources = {item.sources: item for item in self.instances.values() if item.sources}
        self.outer = tuple(dict.fromkeys(name[: name.index(".") + 1] for name in names if "." in name))

    def instance(self, weight: str, name: str) -> Instance:
        """The rule of a weight that an adapter's tensor ``name`` is for.

        Raises:
            MappingError: the model has no such weight.
        """
        if weight not in self.instances:
            raise MappingError(
                f"the model ({self.model.family}, {self.model.config.num_layers} layers) has no weight for it",
                tensor=name,
                expected=f"a weight such as {next(iter(self.matrices()))}",
                found=weight,
                remedy="give the base model's own configuration with --config",
            )
        return self.instances[weight]

    def matrices(self) -> Iterable[str]:
        """Hub names of the matrices."""
        return (name for name, item in self.instances.items() if len(item.shape) == 2)

    def split(self, weight: str, parts: Iterable[str] = ()) -> tuple[Operation, ModelConfig] | None:
        """How the rows of a weight's parts go together, and the layer's configuration; None if it has no parts.

        Args:
            weight: hub name.
            parts: those that there are: they tell which way it is where the family has another one than Megatron.
        """
        item = self.instances[weight]
        known = split_by_name(weight, item.config)
        if known is not None and set(parts) <= set(known.parts):
            return known, item.config
        own = item.rule.operation.rows_together()
        return (own, item.config) if own is not None and own.parts and set(parts) <= set(own.parts) else None


def split_by_name(weight: str, config: ModelConfig) -> Operation | None:
    """How Megatron lays the parts of a weight's rows together, None if it has none."""
    for pattern, operation, applies in _SPLIT:
        if pattern.fullmatch(weight) and applies(config):
            return operation
    return None


# -- forms ---------------------------------------------------------------------------------------------------


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


def by_weight(adapter: Adapter) -> dict[str, dict[str, LowRank]]:
    """Updates by the weight that they change, and by its part.

    Raises:
        MappingError: a weight is adapted as a whole and in parts.
    """
    grouped: dict[str, dict[str, LowRank]] = {}
    for target, update in adapter.updates.items():
        grouped.setdefault(target.weight, {})[target.part] = update
    for parts in grouped.values():
        if "" in parts and len(parts) > 1:
            raise MappingError(
                "adapts a weight as a whole and in parts",
                tensor=(parts[""].names or ("",))[0],
                found=some(name for part in parts if part for name in parts[part].names),
            )
    return grouped


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


def all_equal(tensors: Sequence[LazyTensor]) -> bool:
    """Whether tensors have the same elements; reads them."""
    first = tensors[0]
    return all(
        other.shape == first.shape
        and all(a.tobytes() == b.tobytes() for a, b in zip(first.chunks(), other.chunks(), strict=True))
        for other in tensors[1:]
    )


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


def is_zero(tensor: LazyTensor) -> bool:
    """Whether all elements are; reads up to the first that is not."""
    return all(not np.count_nonzero(chunk) for chunk in tensor.chunks())


# -- checks --------------------------------------------------------------------------------------------------


def check_update(target: Target, update: LowRank, layers: Layers) -> None:
    """Check that an update fits its weight.

    Raises:
        MappingError: the model has no such weight or part, or of another shape.
    """
    name = (update.names or (str(target),))[-1]
    item = layers.instance(target.weight, name)
    shape = item.shape
    if target.part:
        split = layers.split(target.weight, [target.part])
        if split is None:
            raise MappingError(f"the model's weight has no part {target.part!r}", tensor=name, found=target.weight)
        operation, config = split
        shape = operation.source_shapes(shape, config)[operation.parts.index(target.part)]
    check_factors(update, name)
    rows, columns = update.up.shape[0], update.down.shape[1]
    padded = item.rule.of_vocabulary and (layers.model.config.vocab_size or 0) <= rows <= shape[0]
    if len(shape) != 2 or columns != shape[1] or (rows != shape[0] and not padded):
        raise MappingError(
            "the adapter is of another base model",
            tensor=name,
            expected=f"an update of a weight of shape {shape}",
            found=f"one of shape {(rows, columns)}",
            remedy="give the base model that it was trained on, or its configuration with --config",
        )
    for vector in (update.magnitude, update.bias):
        if vector is not None and vector.shape != (rows,):
            raise MappingError(
                "has another length than the weight has rows", tensor=name, expected=(rows,), found=vector.shape
            )


def check_factors(update: LowRank, name: str) -> None:
    """Check that the two factors can be multiplied.

    Raises:
        MappingError: they cannot.
    """
    down, up = update.down, update.up
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.size or not up.size:
        raise MappingError(
            "the two factors of an update do not fit together",
            tensor=name,
            expected="(rank, in) and (out, rank) of one rank",
            found=f"{down.shape} and {up.shape}",
        )
    if not down.dtype.is_floating or not up.dtype.is_floating or down.dtype.numpy is None or up.dtype.numpy is None:
        raise MappingError(
            "an adapter's factor is not of floating-point numbers",
            tensor=name,
            found=f"{down.dtype.name} and {up.dtype.name}",
        )


def some(names: Iterable[str]) -> str:
    """A few of many names."""
    listed = list(names)
    more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
