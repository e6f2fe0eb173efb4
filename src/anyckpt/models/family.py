"""What a model family is: one declarative value, in a file of its own under ``families``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.indexing import Shape
from anyckpt.models.config import Field, ModelConfig, Reader
from anyckpt.models.meta_names import MetaNames
from anyckpt.models.rules import AXES, DIMENSIONS, Axis, Dimension, Instance, Layer, Rule, instances, same_layers
from anyckpt.models.variants import Variant


@dataclass(frozen=True)
class HuggingFace:
    """How transformers knows a family.

    Attributes:
        model_types: ``model_type`` values that are read; the first is written.
        architectures: classes that are read; the first is written.
        defaults: by key, what transformers' configuration class takes where ``config.json`` has no such key.
        fields: the one-to-one keys, ``config_hf.COMMON`` and the family's own.
        constants: keys that are written as they are.
        activations: hub activation -> spelling, where it is not the usual one.
        misspelled: spelling -> hub activation, where the family means something else by it.
        rotary_base_key: key of theta in 4.x.
        rotary_base: what it is where no key says.
        rotary_percent_key: key of the rotated fraction of a head in 4.x.
        rotary_percent: what it is where no key says.
        attention_bias: what ``attention_bias`` is where the key is absent; None if the family has no such key.
        activation_key: key of the MLP's activation; None if it is none of the configuration's.
        read: hub fields that are no one-to-one keys, from the configuration and the fields parsed so far; stronger
            than both the table and the traits.
        write: the keys of ``read``, from the model; notes are appended to the list.
        keys: names of these keys.
        variants: other spellings under which tensors are stored.
        prefix: what names begin with, but those of the head, where a class has one.
        headless: whether the class written has no head, so that names are written without ``prefix``.
        copies: stored names of tensors that are there a second time, each with the one it is the same as.
        foreign: transformers' keys from a ``config.json`` of another code that the family's models are of; None if it
            is not one.
        registered: parts of names in the order in which transformers' modules register parameters (see
            ``registered``); empty where that is not known.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    fields: tuple[Field, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    misspelled: Mapping[str, str] = field(default_factory=dict)
    rotary_base_key: str = "rope_theta"
    rotary_base: float = 10000.0
    rotary_percent_key: str = "partial_rotary_factor"
    rotary_percent: float = 1.0
    attention_bias: bool | None = False
    activation_key: str | None = "hidden_act"
    read: Callable[[Reader, Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda reader, found: {})
    write: Callable[[ModelConfig, list[str]], Mapping[str, Any]] = field(default=lambda config, notes: {})
    keys: frozenset[str] = frozenset()
    variants: tuple[Variant, ...] = ()
    prefix: str = ""
    headless: Callable[[ModelConfig], bool] = field(default=lambda config: False)
    copies: tuple[tuple[str, str], ...] = ()
    foreign: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = field(default=lambda config: None)
    registered: tuple[str, ...] = ()


@dataclass(frozen=True)
class NeMo2:
    """How NeMo 2 knows a family.

    Attributes:
        module: Python module of the classes.
        model: name of the model class.
        configs: names of the configuration classes that are read, and by key their defaults beyond the family's.
        choose: name of the configuration class to write.
        fields: one-to-one fields of these classes beyond NeMo's common ones.
        own: names of common hub fields that ``read`` gives, because these classes spell them in another way.
        read: hub fields that are no one-to-one fields, from the configuration and the class's defaults.
        write: fields that are no one-to-one fields; they replace what is written otherwise.
        without: fields that NeMo 2's other classes have and these have not.
    """

    module: str
    model: str
    configs: Mapping[str, Mapping[str, Any]]
    choose: Callable[[ModelConfig], str]
    fields: tuple[Field, ...] = ()
    own: frozenset[str] = frozenset()
    read: Callable[[Reader, Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda reader, defaults: {})
    write: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})
    without: frozenset[str] = frozenset()


def unrefined(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """The configuration itself, for families whose configurations say everything."""
    return config


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
        nemo2: spelling there; None if it has no such models.
        meta: names in Meta's, Mistral's and torchtitan's code; None if they have no such models.
        nemo1: whether NeMo 1 has such models.
        nemo1_classes: NeMo 1's classes for them other than ``MegatronGPTModel``, without the module, and what these
            take where their configuration has no such key: a value, or a function of the configuration.
        megatron: whether Megatron-Core has such models.
        unties: kinds of configuration (``identify.KINDS``) whose models have an output layer of their own even where
            the model's is its embedding, which then is written twice.
        features: of ``config.FEATURES``, those that the family may have; ``yarn`` if its rope may be scaled so.
        recognise: whether a Megatron or NeMo 1 configuration that has the traits is of this family.
        nemo1_keys: keys that NeMo 1 needs for the family beyond the common ones; they replace what is written
            otherwise.
        megatron_keys: the same of Megatron-LM's arguments.
        caveats: what a kind of configuration (``identify.KINDS``) cannot say of a model; each becomes a note.
        refine: the configuration with what the tensors say and it may leave out, from the shapes of those outside
            layers by the hub's names.
        whole_norms: by kind of configuration, a key that marks models whose norms are stored as gamma although the
            family's are gamma - 1, which they then become on the way to the hub.
        twins: hub names that a checkpoint of Megatron's may have for a tensor besides its own, each with this one.
        prefixes: by dialect, what Megatron names begin with where it is not the dialect's own prefix.
        axes: what stars count besides layers.
        dimensions: lengths that the rules name beyond the common ones.
        layer: the configuration as one layer sees it, for models whose layers differ; the layer's lengths, operations
            and conditions get it.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]
    traits: Mapping[str, Any]
    hugging_face: HuggingFace
    nemo2: NeMo2 | None = None
    meta: MetaNames | None = None
    nemo1: bool = True
    nemo1_classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    megatron: bool = True
    unties: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    ignorable: tuple[tuple[str, str], ...] = ()
    recognise: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    nemo1_keys: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})
    megatron_keys: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})
    caveats: Callable[[ModelConfig, str], Iterable[str]] = field(default=lambda config, kind: ())
    refine: Callable[[ModelConfig, Mapping[str, Shape]], ModelConfig] = unrefined
    whole_norms: Mapping[str, str] = field(default_factory=dict)
    twins: tuple[tuple[str, str], ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Axis] = field(default_factory=dict)
    dimensions: Mapping[str, Dimension] = field(default_factory=dict)
    layer: Layer = same_layers

    def expected(self, config: ModelConfig) -> list[Instance]:
        """Every tensor that a model of this configuration has."""
        lengths = {**DIMENSIONS, **self.dimensions}
        return list(instances(self.rules, {**AXES, **self.axes}, lengths, config, self.layer))
