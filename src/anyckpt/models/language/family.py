"""What a model family is: one declarative value, in a file of its own under ``families``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING

from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import Spellings
from anyckpt.config.starred import SEGMENT, starred
from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape
from anyckpt.models.language.rules import (
    AXES,
    DIMENSIONS,
    Axis,
    Dimension,
    Instance,
    Layer,
    Rule,
    instances,
    same_layers,
)

if TYPE_CHECKING:
    from anyckpt.layout.partition import Partition
    from anyckpt.models.speech.companions import Companions


def unrefined(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """The configuration itself, for families whose configurations say everything."""
    return config


@dataclass(frozen=True, kw_only=True)
class Family(Spellings):
    """A model family: which tensors it has, where they go, and how its configuration is spelled.

    Attributes:
        rules: which tensors there are, and how they map to the hub.
        ignorable: patterns of stored names that carry no weights (``*`` is one dotted segment), with the reason.
        unties: kinds of configuration (``identify.KINDS``) whose models have an output layer of their own even where
            the model's is its embedding, which then is written twice.
        refine: the configuration with what the tensors say and it may leave out, from the shapes of those outside
            layers by the hub's names.
        whole_norms: by kind of configuration, a key that marks models whose norms are stored as gamma although the
            family's are gamma - 1, which they then become on the way to the hub.
        twins: hub names that a checkpoint of Megatron's may have for a tensor besides its own, each with this one.
        prefixes: by dialect, what Megatron names begin with where it is not the dialect's own prefix.
        axes: what stars count besides layers.
        dimensions: lengths that the rules name beyond the common ones.
        like: the family whose tensors have the same names and whose models are many more, which alone is said where
            names alone tell; "" if there is none.
        companions: files beside the weights that say more of the models than a configuration does; None if there are
            none but a tokenizer's, which go as they are.
        layer: the configuration as one layer sees it, for models whose layers differ; the layer's lengths, operations
            and conditions get it.
    """

    rules: tuple[Rule, ...]
    ignorable: tuple[tuple[str, str], ...] = ()
    unties: frozenset[str] = frozenset()
    refine: Callable[[ModelConfig, Mapping[str, Shape]], ModelConfig] = unrefined
    whole_norms: Mapping[str, str] = field(default_factory=dict)
    twins: tuple[tuple[str, str], ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Axis] = field(default_factory=dict)
    dimensions: Mapping[str, Dimension] = field(default_factory=dict)
    like: str = ""
    companions: Companions | None = None
    layer: Layer = same_layers

    @property
    def has_vocabulary(self) -> bool:
        return any(rule.of_vocabulary for rule in self.rules)

    def reason_to_ignore(self, name: str) -> str | None:
        """Why a stored tensor is of no interest, which carries no weights; None if it is of interest."""
        return next((why for each, why in self.ignorable if starred(each, SEGMENT).fullmatch(name)), None)

    @property
    def partitions(self) -> dict[str, str | Partition]:
        """How tensor parallelism divides what its rules say it of: hub name with ``*`` for every number -> kind."""
        said = {rule.hub: rule.partition for rule in self.rules if rule.partition is not None}
        in_stacks = {hub.replace(".transformer_layer.", ".mtp_model_layer."): kind for hub, kind in said.items()}
        return {**said, **in_stacks}  # as a HybridModel calls the layers of a step of prediction

    def expected(self, config: ModelConfig) -> list[Instance]:
        """Every tensor that a model of this configuration has."""
        lengths = {**DIMENSIONS, **self.dimensions}
        return list(instances(self.rules, {**AXES, **self.axes}, lengths, config, self.layer))
