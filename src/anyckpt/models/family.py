"""What a model family is: one declarative value, in a file of its own under ``families``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.models.config import Field, ModelConfig
from anyckpt.models.rules import AXES, DIMENSIONS, Axis, Dimension, Instance, Rule, instances


@dataclass(frozen=True)
class HuggingFace:
    """How transformers knows a family.

    Attributes:
        model_types: ``model_type`` values that are read; the first is written.
        architectures: classes that are read; the first is written.
        defaults: by key, what transformers' configuration class takes where ``config.json`` has no such key.
        fields: the one-to-one keys, ``config_hf.COMMON`` and the family's own.
        constants: keys that are written as they are.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    fields: tuple[Field, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NeMo2:
    """How NeMo 2 knows a family.

    Attributes:
        module: Python module of the classes.
        model: name of the model class.
        configs: names of the configuration classes that are read, and by key their defaults beyond the family's.
        choose: name of the configuration class to write.
    """

    module: str
    model: str
    configs: Mapping[str, Mapping[str, Any]]
    choose: Callable[[ModelConfig], str]


@dataclass(frozen=True)
class Family:
    """A model family: which tensors it has, where they go, and how its configuration is spelled.

    Attributes:
        name: as in ``--family``.
        title: for people.
        rules: which tensors there are, and how they map to the hub.
        ignorable: patterns of stored names that carry no weights (``*`` is one dotted segment), with the reason.
        traits: hub fields that every model of the family has; they also tell the family of a Megatron or NeMo 1
            configuration, which does not name it.
        hugging_face: spelling there.
        nemo2: spelling there.
        features: of ``config.FEATURES``, those that the family may have.
        recognise: whether a Megatron or NeMo 1 configuration that has the traits is of this family.
        axes: what stars count besides layers.
        dimensions: lengths that the rules name beyond the common ones.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]
    traits: Mapping[str, Any]
    hugging_face: HuggingFace
    nemo2: NeMo2
    features: frozenset[str] = frozenset()
    ignorable: tuple[tuple[str, str], ...] = ()
    recognise: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    axes: Mapping[str, Axis] = field(default_factory=dict)
    dimensions: Mapping[str, Dimension] = field(default_factory=dict)

    def expected(self, config: ModelConfig) -> list[Instance]:
        """Every tensor that a model of this configuration has."""
        return list(instances(self.rules, {**AXES, **self.axes}, {**DIMENSIONS, **self.dimensions}, config))
