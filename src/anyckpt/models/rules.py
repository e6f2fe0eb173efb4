"""Rules: which tensors of a family become which tensors of the hub, and how; data, read both ways.

A rule has patterns of names.  A ``*`` stands for the index of a layer, a second one for the index of an expert: the
k-th star of every pattern of a rule is the same index, along the rule's k-th axis.  Which indices exist follows from
the configuration, so a rule table and a configuration together say exactly which tensors a model consists of.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from anyckpt.errors import MappingError
from anyckpt.indexing import Shape
from anyckpt.models.config import ModelConfig
from anyckpt.tensor import LazyTensor, Mapped, concatenate

Partition = Literal[
    "column", "row", "gate-up", "qkv", "vocabulary", "replicated", "latent-down", "mamba-in", "mamba-conv", "alone"
]
"""How tensor parallelism divides a hub tensor, in the words of ``layout.partition``.

``column`` along axis 0; ``row`` along axis 1; ``gate-up`` each half of axis 0 separately; ``qkv`` along axis 0, whose
rows are interleaved by query group; ``vocabulary`` along axis 0 after padding; ``replicated`` not at all;
``latent-down``, ``mamba-in``, ``mamba-conv`` and ``alone`` as ``layout.partition.KINDS`` says.
"""


class Operation(ABC):
    """How the tensors of one side of a rule become those of the other; both ways are views."""

    @abstractmethod
    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        """The hub tensor; shapes have been checked."""

    @abstractmethod
    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        """The source tensors, in the order of the rule's patterns."""

    @abstractmethod
    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        """Shapes of the source tensors of a hub tensor of this shape."""

    parts: tuple[str, ...] = ()
    """How Megatron calls each of several sources where it knows them apart, as in adapters."""

    def on_rows(self) -> Operation | None:
        """The same operation on tensors that share only the weights' output features, as their axis 0; None if none.

        Such are the second factor of a low-rank update, (out, rank), and a norm per output feature, whatever the order
        in which the weights themselves are stored.
        """
        return None

    def rows_together(self) -> Operation | None:
        """How the rows of several sources lie in the hub's tensor, if ``on_rows`` changes values besides."""
        return self.on_rows()

    def of_part(self, number: int) -> Operation:
        """How the rows of one of several sources become those of its part of the hub's tensor."""
        return IDENTITY

    def remark(self, config: ModelConfig) -> str | None:
        """What a user should know of the values that this operation gives for such a model; None if they are exact."""
        return None


class Identity(Operation):
    """The same tensor under another name."""

    def on_rows(self) -> Operation | None:
        return self

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return sources[0]

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [tensor]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [shape]


class InterleavedQueryKeyValue(Operation):
    """Query, key and value rows interleaved by query group: a group's query heads, its key head, its value head.

    For weights and biases alike.
    """

    parts = ("q", "k", "v")

    def on_rows(self) -> Operation | None:
        return self

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        groups, rest = config.num_query_groups, sources[0].shape[1:]
        grouped = [tensor.reshape((groups, tensor.shape[0] // groups, *rest)) for tensor in sources]
        return concatenate(grouped, 1).reshape((sum(tensor.shape[0] for tensor in sources), *rest))

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        groups, rest = config.num_query_groups, tensor.shape[1:]
        grouped = tensor.reshape((groups, tensor.shape[0] // groups, *rest))
        parts, start = [], 0
        for shape in self.source_shapes(tensor.shape, config):
            rows = shape[0] // groups
            parts.append(grouped.narrow(1, start, rows).reshape(shape))
            start += rows
        return parts

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        query = config.num_attention_heads * config.kv_channels
        key = config.num_query_groups * config.kv_channels
        return [(rows, *shape[1:]) for rows in (query, key, key)]


class InterleavedKeyValue(Operation):
    """Key and value rows interleaved by query group: a group's key head, then its value head (cross attention)."""

    parts = ("k", "v")

    def on_rows(self) -> Operation | None:
        return self

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        groups, rest = config.num_query_groups, sources[0].shape[1:]
        heads = [tensor.reshape((groups, tensor.shape[0] // groups, *rest)) for tensor in sources]
        return concatenate(heads, 1).reshape((sum(tensor.shape[0] for tensor in sources), *rest))

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        groups, rest = config.num_query_groups, tensor.shape[1:]
        rows = tensor.shape[0] // (2 * groups)
        heads = tensor.reshape((groups, 2 * rows, *rest))
        return [heads.narrow(1, part * rows, rows).reshape((groups * rows, *rest)) for part in range(2)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2


class Halves(Operation):
    """Two tensors of one shape, one after the other along axis 0: the gate and the up projection of a gated MLP."""

    parts = ("gate", "up")

    def on_rows(self) -> Operation | None:
        return self

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return concatenate(sources, 0)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        half = tensor.shape[0] // 2
        return [tensor.narrow(0, 0, half), tensor.narrow(0, half, half)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2


class ConcatenatedQueryKeyValue(Operation):
    """One tensor that holds all query rows, then all key rows, then all value rows, interleaved by query group."""

    _separate = InterleavedQueryKeyValue()

    def on_rows(self) -> Operation | None:
        return self

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        parts, start = [], 0
        for shape in self._separate.source_shapes(sources[0].shape, config):
            parts.append(sources[0].narrow(0, start, shape[0]))
            start += shape[0]
        return self._separate.to_hub(parts, config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [concatenate(self._separate.from_hub(tensor, config), 0)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [shape]


class Transposed(Operation):
    """Another operation on matrices that are stored as (in, out), as transformers' ``Conv1D`` does.

    Args:
        inner: the operation on the transposed sources.
    """

    def __init__(self, inner: Operation) -> None:
        self._inner = inner

    def on_rows(self) -> Operation | None:
        return self._inner.on_rows()

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return self._inner.to_hub([tensor.transpose() for tensor in sources], config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [part.transpose() for part in self._inner.from_hub(tensor, config)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [part[::-1] for part in self._inner.source_shapes(shape, config)]


class Leading(Operation):
    """The same elements with more or fewer leading axes of length one.

    Args:
        more: so many more has the hub tensor; negative for fewer.
    """

    def __init__(self, more: int) -> None:
        self._more = more

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return sources[0].reshape(self._with(sources[0].shape, self._more))

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [tensor.reshape(self._with(tensor.shape, -self._more))]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [self._with(shape, -self._more)]

    def _with(self, shape: Shape, more: int) -> Shape:
        return (1,) * more + shape[max(0, -more) :]


class Scaled(Operation):
    """Another operation on sources of which some are multiplied by a number.

    A power of two changes exponents alone, so both ways are exact.  By any other number values are multiplied (and
    divided on the way back) in float32, or float64 if they are that, and rounded to their own type.

    Args:
        inner: the operation on the multiplied sources.
        factor: the number, which may be 1 for some models.
        parts: which of the sources are multiplied.
    """

    def __init__(self, inner: Operation, factor: Callable[[ModelConfig], float], parts: tuple[int, ...] = (0,)) -> None:
        self._inner = inner
        self._factor = factor
        self._parts = parts
        self.parts = inner.parts

    def on_rows(self) -> Operation | None:
        inner = self._inner.on_rows()
        return None if inner is None else Scaled(inner, self._factor, self._parts)

    def rows_together(self) -> Operation | None:
        return self._inner.rows_together()

    def of_part(self, number: int) -> Operation:
        return Scaled(IDENTITY, self._factor) if number in self._parts else IDENTITY

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return self._inner.to_hub(self._changed(sources, config, np.multiply), config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return self._changed(self._inner.from_hub(tensor, config), config, np.divide)

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return self._inner.source_shapes(shape, config)

    def remark(self, config: ModelConfig) -> str | None:
        factor = self._factor(config)
        if abs(math.frexp(factor)[0]) == 0.5:
            return self._inner.remark(config)
        return f"Megatron's values are Hugging Face's times {factor:.6g}, rounded: not bit for bit the same either way"

    def _changed(
        self, tensors: Sequence[LazyTensor], config: ModelConfig, change: Callable[..., np.ndarray]
    ) -> list[LazyTensor]:
        factor = self._factor(config)
        if factor == 1:
            return list(tensors)
        return [_scaled(t, factor, change) if part in self._parts else t for part, t in enumerate(tensors)]


def _scaled(tensor: LazyTensor, factor: float, change: Callable[..., np.ndarray]) -> LazyTensor:
    if tensor.dtype.numpy is None:
        raise MappingError(
            "this family's values are scaled on the way, which their type does not allow",
            expected="floating-point weights", found=tensor.dtype.name,
        )  # fmt: skip
    own, wide = tensor.dtype.numpy, "<f8" if tensor.dtype.name == "float64" else "<f4"

    def scale(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            result = change(values.astype(wide), factor).astype(own)
        if np.isinf(result).any() and not np.isinf(values).any():
            raise MappingError(
                "a weight is too large to be scaled in its type", expected=f"less than {tensor.dtype.name}'s largest",
                found=f"{float(np.abs(values.astype(wide)).max()):.4g}", remedy="cast to bf16 or fp32 before",
            )  # fmt: skip
        return result

    return Mapped((tensor,), tensor.dtype, scale)


IDENTITY = Identity()
INTERLEAVED_QKV = InterleavedQueryKeyValue()
INTERLEAVED_KV = InterleavedKeyValue()
CONCATENATED_QKV = ConcatenatedQueryKeyValue()
GATE_UP = Halves()
TRANSPOSED = Transposed(IDENTITY)
TRANSPOSED_CONCATENATED_QKV = Transposed(CONCATENATED_QKV)

Condition = Callable[[ModelConfig, tuple[int, ...]], bool]


def _always(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        source: patterns of the family's own names, in the operation's order; none if the family has no such tensor,
            and the hub's is zeros (a bias that Megatron's layer has and the family's has not).
        hub: pattern of the hub's name.
        shape: lengths of the hub tensor, as names of ``DIMENSIONS`` or of the family's own.
        operation: how source becomes hub and back.
        partition: how tensor parallelism divides the hub tensor.
        when: whether the tensor exists, from the configuration and the indices that the stars stand for.
        axes: what the stars count, as names of ``AXES`` or of the family's own.
        optional: nothing is computed with the hub's tensor, so that a stored model may lack it.  Only without source.
        after: a length as in ``shape``, by which the first star of the source is more than that of the hub; "" for 0.
    """

    source: tuple[str, ...]
    hub: str
    shape: tuple[str, ...]
    operation: Operation = IDENTITY
    partition: Partition = "replicated"
    when: Condition = _always
    axes: tuple[str, ...] = ("layer", "expert")
    after: str = ""
    optional: bool = False


Dimension = Callable[[ModelConfig], int]

DIMENSIONS: Mapping[str, Dimension] = {
    "hidden": lambda config: config.hidden_size,
    "vocabulary": lambda config: config.rows or 0,
    "attention": lambda config: config.num_attention_heads * config.kv_channels,
    "qkv": lambda config: (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,
    "head": lambda config: config.kv_channels,
    "positions": lambda config: config.max_position_embeddings or 0,
    "ffn": lambda config: config.ffn_hidden_size,
    "fc1": lambda config: config.ffn_hidden_size * (2 if config.gated_linear_unit else 1),
    "experts": lambda config: config.num_moe_experts or 0,
    "expert-ffn": lambda config: config.moe_ffn_hidden_size or 0,
    "expert-fc1": lambda config: (config.moe_ffn_hidden_size or 0) * (2 if config.gated_linear_unit else 1),
    "shared-ffn": lambda config: config.moe_shared_expert_intermediate_size or 0,
    "shared-fc1": lambda config: (
        (config.moe_shared_expert_intermediate_size or 0) * (2 if config.gated_linear_unit else 1)
    ),
    "one": lambda config: 1,
    "layers": lambda config: config.num_layers,
}
"""Lengths that every family's rules may refer to by name."""

Axis = Callable[[ModelConfig], Iterable[int]]

AXES: Mapping[str, Axis] = {
    "layer": lambda config: range(config.num_layers),
    "expert": lambda config: range(config.num_moe_experts or 0),
    "mtp": lambda config: range(config.mtp_num_layers or 0),
}
"""What the stars of every family's rules may count."""


Layer = Callable[[ModelConfig, int], ModelConfig]


def same_layers(config: ModelConfig, layer: int) -> ModelConfig:
    """The configuration as a layer sees it where all layers are alike: the model's own."""
    return config


@dataclass(frozen=True)
class Instance:
    """A rule for one layer (and expert): concrete names, the hub tensor's shape, and the layer's configuration."""

    rule: Rule
    sources: tuple[str, ...]
    hub: str
    shape: Shape
    config: ModelConfig


def instances(
    rules: Sequence[Rule],
    axes: Mapping[str, Axis],
    dimensions: Mapping[str, Dimension],
    config: ModelConfig,
    layer: Layer = same_layers,
) -> Iterator[Instance]:
    """Every tensor that a model of this configuration has: layer by layer between what has no layer.

    Args:
        rules: the family's table.
        axes: the indices along each axis.
        dimensions: what the names in shapes mean.
        config: the model.
        layer: the configuration as one layer sees it, by the index along the axis called ``layer``.
    """
    lengths = {name: dimension(config) for name, dimension in dimensions.items()}
    prepared = [
        _Prepared(
            entry,
            tuple(pattern.split("*") for pattern in entry.source),
            entry.hub.split("*"),
            tuple(lengths[name] for name in entry.shape),
            lengths[entry.after] if entry.after else 0,
        )
        for entry in rules
    ]
    leading = list(itertools.takewhile(lambda item: not item.axes, prepared))
    starred = [item for item in prepared if item.axes]
    for item in leading:
        yield from item.at((), config)
    for outer in dict.fromkeys(item.axes[0] for item in starred):
        together = [item for item in starred if item.axes[0] == outer]
        for first in axes[outer](config):
            seen = layer(config, first) if outer == "layer" else config
            own = together if seen is config else [item.seen_by(seen, dimensions) for item in together]
            for item in own:
                for rest in itertools.product(*(axes[name](seen) for name in item.axes[1:])):
                    yield from item.at((first, *rest), seen)
    for item in prepared[len(leading) :]:
        if not item.axes:
            yield from item.at((), config)


@dataclass(frozen=True)
class _Prepared:
    """A rule with its patterns cut at their stars and its shape in numbers."""

    rule: Rule
    sources: tuple[list[str], ...]
    hub: list[str]
    shape: Shape
    after: int

    @property
    def axes(self) -> tuple[str, ...]:
        return self.rule.axes[: len(self.hub) - 1]

    def seen_by(self, config: ModelConfig, dimensions: Mapping[str, Dimension]) -> _Prepared:
        """The same with the shape that it has in a layer of this configuration."""
        return replace(self, shape=tuple(dimensions[name](config) for name in self.rule.shape))

    def at(self, indices: tuple[int, ...], config: ModelConfig) -> Iterator[Instance]:
        if self.rule.when(config, indices):
            numbers = (indices[0] + self.after, *indices[1:]) if self.after else indices
            sources = tuple(_fill(pattern, numbers) for pattern in self.sources)
            yield Instance(self.rule, sources, _fill(self.hub, indices), self.shape, config)


def _fill(pieces: Sequence[str], indices: tuple[int, ...]) -> str:
    """A pattern, cut at its stars, with the indices in their place."""
    return pieces[0] + "".join(f"{index}{piece}" for index, piece in zip(indices, pieces[1:], strict=True))
