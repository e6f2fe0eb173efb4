"""Rules: which tensors of a family become which tensors of the hub, and how; data, read both ways.

A rule has patterns of names.  A ``*`` stands for the index of a layer, a second one for the index of an expert: the
k-th star of every pattern of a rule is the same index, along the rule's k-th axis.  Which indices exist follows from
the configuration, so a rule table and a configuration together say exactly which tensors a model consists of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape
from anyckpt.models.language.rule_operations import IDENTITY, Operation

if TYPE_CHECKING:
    from anyckpt.layout.partition import Partition

Condition = Callable[[ModelConfig, tuple[int, ...]], bool]


def has(field: str) -> Condition:
    """That a field of the configuration is neither absent nor false nor zero."""

    def condition(config: ModelConfig, indices: tuple[int, ...]) -> bool:
        return bool(getattr(config, field))

    return condition


def lacks(field: str) -> Condition:
    """The contrary of ``has``."""

    def condition(config: ModelConfig, indices: tuple[int, ...]) -> bool:
        return not getattr(config, field)

    return condition


def always(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """In every layer of every model."""
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
        when: whether the tensor exists, from the configuration and the indices that the stars stand for.
        axes: what the stars count, as names of ``AXES`` or of the family's own.
        optional: nothing is computed with the hub's tensor, so that a stored model may lack it.  Only without source.
        after: a length as in ``shape``, by which the first star of the source is more than that of the hub; "" for 0.
        partition: how tensor parallelism divides the hub tensor, where that is not what ``layout.partition.TABLE`` says
            of its name: one of its words, or a way of the family's own.
        tower: of a model that is made of several, that which the tensor is of (a key of ``ModelConfig.towers``):
            lengths, indices, condition and operation are by its configuration; "" for the model's own.
    """

    source: tuple[str, ...]
    hub: str
    shape: tuple[str, ...]
    operation: Operation = IDENTITY
    when: Condition = always
    axes: tuple[str, ...] = ("layer", "expert")
    after: str = ""
    optional: bool = False
    partition: str | Partition | None = None
    tower: str = ""

    @property
    def of_vocabulary(self) -> bool:
        """Whether the hub tensor has a row for each token, and rows of padding behind them."""
        return self.shape[:1] == ("vocabulary",)


Dimension = Callable[[ModelConfig], int]

DIMENSIONS: Mapping[str, Dimension] = {
    "hidden": lambda config: config.hidden_size,
    "vocabulary": lambda config: config.rows or 0,
    "attention": lambda config: config.num_attention_heads * config.kv_channels,
    "qkv": lambda config: (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,
    "keys": lambda config: config.num_query_groups * config.kv_channels,
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
    prepared = [
        _Prepared(
            entry,
            tuple(map(_format_of, entry.source)),
            _format_of(entry.hub),
            tuple(dimensions[name](seen) for name in entry.shape),
            dimensions[entry.after](seen) if entry.after else 0,
        )
        for entry, seen in ((entry, of_tower(config, entry.tower)) for entry in rules)
    ]
    leading = list(itertools.takewhile(lambda item: not item.axes, prepared))
    starred = [item for item in prepared if item.axes]
    for item in leading:
        yield from item.at((), of_tower(config, item.rule.tower))
    for tower, outer in dict.fromkeys((item.rule.tower, item.axes[0]) for item in starred):
        together = [item for item in starred if (item.rule.tower, item.axes[0]) == (tower, outer)]
        whole = of_tower(config, tower)
        for first in axes[outer](whole):
            seen = layer(whole, first) if outer == "layer" else whole
            own = together if seen is whole else [item.seen_by(seen, dimensions) for item in together]
            for item in own:
                for rest in itertools.product(*(axes[name](seen) for name in item.axes[1:])):
                    yield from item.at((first, *rest), seen)
    for item in prepared[len(leading) :]:
        if not item.axes:
            yield from item.at((), of_tower(config, item.rule.tower))


def of_tower(config: ModelConfig, tower: str) -> ModelConfig:
    """The configuration of one of the models that a model is made of; its own if none is named."""
    return config.towers[tower] if tower else config


@dataclass(frozen=True)
class _Prepared:
    """A rule with its patterns as formats of their indices and its shape in numbers."""

    rule: Rule
    sources: tuple[str, ...]
    hub: str
    shape: Shape
    after: int

    @property
    def axes(self) -> tuple[str, ...]:
        return self.rule.axes[: self.rule.hub.count("*")]

    def seen_by(self, config: ModelConfig, dimensions: Mapping[str, Dimension]) -> _Prepared:
        """The same with the shape that it has in a layer of this configuration."""
        return replace(self, shape=tuple(dimensions[name](config) for name in self.rule.shape))

    def at(self, indices: tuple[int, ...], config: ModelConfig) -> Iterator[Instance]:
        if self.rule.when(config, indices):
            numbers = (indices[0] + self.after, *indices[1:]) if self.after else indices
            sources = tuple([pattern % numbers for pattern in self.sources])
            yield Instance(self.rule, sources, self.hub % indices, self.shape, config)


def _format_of(pattern: str) -> str:
    """What gives a name of its indices by ``%``, which take the places of the stars."""
    return pattern.replace("%", "%%").replace("*", "%s")
