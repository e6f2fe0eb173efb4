"""How each framework spells what a model is; a family's values say what is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from anyckpt.config.defaults import is_known, of_class
from anyckpt.config.fields import Codec, Field
from anyckpt.config.meta_names import MetaNames
from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class Variant:
    """One stored spelling.

    A ``*`` is an index and is the same on both sides.  If the family's names have one star more, which must be the
    last, it counts the leading axis of the stored tensor (experts); several names then share the next axis evenly.

    Attributes:
        stored: pattern of the stored name.
        names: patterns of the family's names, as its rules have them.
        written: it is how the family is stored: what is written, and what messages name.
        transposed: each expert's part of the stored tensor has its axes in reverse order, as (in, out).
        in_memory: transformers of today calls it so once it is loaded, and so adapters name it.
    """

    stored: str
    names: tuple[str, ...]
    written: bool = False
    transposed: bool = False
    in_memory: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the stored tensor has a leading axis that the family's have not."""
        return self.names[0].count("*") > self.stored.count("*")


@dataclass(frozen=True)
class HuggingFace:
    """How transformers knows a family.

    Attributes:
        model_types: ``model_type`` values that are read; the first is written.
        architectures: classes that are read; the first is written.
        text_parts: ``model_type`` values of the text parts of larger models, which are the family's models, too; each
            with what its class takes, by key, where that is not what the family's takes.
        defaults: by key, what the configuration class takes where ``config.json`` has no such key; None for those of
            transformers' class (``class_defaults`` has them).
        defaults_of: the ``model_type`` of that class; None for the first of ``model_types``.
        fields: the one-to-one keys, ``hugging_face.COMMON`` and the family's own.
        codecs: what says fields in other ways: read after ``fields`` and what all families have in common (rope,
            activation, element type), and stronger than these.
        constants: keys that are written as they are.
        expected: by key, the only value that the family can have; absent and null are it.
        activations: hub activation -> spelling, where it is not the usual one.
        misspelled: spelling -> hub activation, where the family means something else by it.
        rotary_base_key: key of theta in 4.x.
        rotary_base: what it is where no key says.
        rope_scaling: scaling of rope where no key says; None for none.
        rotary_percent_key: key of the rotated fraction of a head in 4.x.
        rotary_percent: what it is where no key says.
        attention_bias: what ``attention_bias`` is where the key is absent; None if the family has no such key.
        activation_key: key of the MLP's activation; None if it is none of the configuration's.
        keys: names of keys that say nothing of the model.
        carried: keys that change what the model computes, which no other framework has words for: they go with a
            ``config.json`` as they are.
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
    fields: tuple[Field, ...]
    codecs: tuple[Codec, ...] = ()
    text_parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] | None = None
    defaults_of: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    misspelled: Mapping[str, str] = field(default_factory=dict)
    rotary_base_key: str = "rope_theta"
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rotary_percent_key: str = "partial_rotary_factor"
    rotary_percent: float = 1.0
    attention_bias: bool | None = False
    activation_key: str | None = "hidden_act"
    keys: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    variants: tuple[Variant, ...] = ()
    prefix: str = ""
    headless: Callable[[ModelConfig], bool] = field(default=lambda config: False)
    copies: tuple[tuple[str, str], ...] = ()
    foreign: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = field(default=lambda config: None)
    registered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.defaults_of is None:  # for good, so that what is made of this one with other types has its defaults
            object.__setattr__(self, "defaults_of", self.model_types[0])

    @property
    def class_defaults(self) -> Mapping[str, Any]:
        """By key, what the configuration class takes where ``config.json`` has no such key."""
        if self.defaults is not None:
            return self.defaults
        return of_class("transformers", self.defaults_of or "")

    @cached_property
    def handled(self) -> set[str]:
        """Every key that the family's tables look after."""
        return {key for row in (*self.fields, *self.codecs) for key in row.keys} | self.constants.keys() | self.keys

    @cached_property
    def said(self) -> set[str]:
        """Every hub field that its tables read."""
        return {hub for row in (*self.fields, *self.codecs) for hub in row.hubs}


@dataclass(frozen=True)
class NeMo2:
    """How NeMo 2 knows a family.

    Attributes:
        module: Python module of the classes.
        model: name of the model class.
        configs: names of the configuration classes that are read, with ``*`` for several of NeMo's own; the first is
            that of the base class, or that and a star.
        implied: by key, what the classes are that have no such fields.
        choose: name of the configuration class to write; None for the base class.
        fields: one-to-one fields of these classes beyond NeMo's common ones.
        codecs: what says hub fields in other ways; stronger than what all classes have in common.
        without: fields that NeMo 2's other classes have and these have not.
    """

    module: str
    model: str
    configs: tuple[str, ...]
    choose: Callable[[ModelConfig], str] | None = None
    implied: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    codecs: tuple[Codec, ...] = ()
    without: frozenset[str] = frozenset()

    def reads(self, name: str) -> bool:
        """Whether a configuration class is one of these models'."""
        matches = any(fnmatchcase(name, pattern) for pattern in self.configs)
        return name in self.configs or (matches and is_known("nemo2", name))

    def chosen(self, config: ModelConfig) -> str:
        """Name of the configuration class to write."""
        return self._base if self.choose is None else self.choose(config)

    @cached_property
    def said(self) -> set[str]:
        """Every hub field that its tables read."""
        return {hub for row in (*self.fields, *self.codecs) for hub in row.hubs}

    @property
    def _base(self) -> str:
        return self.configs[0].removesuffix("*")

    def class_defaults(self, name: str) -> Mapping[str, Any]:
        """By key, what a configuration class takes; of a class that is not known, what the base class takes."""
        known = name if is_known("nemo2", name) else self._base
        return {**of_class("nemo2", known), **self.implied}


@dataclass(frozen=True)
class TrtLlm:
    """How TensorRT-LLM knows a family.

    Attributes:
        architectures: classes that are read; the first is written.
        decoder: what ModelOpt calls the kind of decoder, as NeMo's ``decoder_type``.
        fits: whether a configuration of one of these classes is of this family's models, where others have the class.
        activation: ``hidden_act`` where it is not transformers' word.
        shares_embedding: a tied model is written without an output layer; else with a copy of the embedding as it.
        windows: the class has the windows of the family's attention by itself.
        normalises: the shares of the experts that a token goes to sum to one in every model of the family; else
            ``moe_router_pre_softmax`` says so, or not.
        told: keys of transformers' that a file tells by others, of the file.
        keys: keys of ``config.json`` beyond the common ones.
    """

    architectures: tuple[str, ...]
    decoder: str
    fits: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: True)
    activation: str | None = None
    shares_embedding: bool = False
    windows: bool = False
    normalises: bool = True
    told: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda config: {})
    keys: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})


@dataclass(frozen=True)
class NeMoSpeech:
    """How NeMo's speech collection knows a family.

    Attributes:
        target: the class, with its module.
        rows: what the sections of its configuration say, in the order in which they are read and written.
        fits: whether a configuration of this class is of this family's models, where others have the class.
    """

    target: str
    rows: tuple[Codec, ...]
    fits: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: True)


@dataclass(frozen=True, kw_only=True)
class Spellings:
    """How the configurations of a family's models are spelled everywhere.

    Attributes:
        name: as in ``--family``.
        title: for people.
        traits: hub fields that every model of the family has; they also tell the family of a Megatron or NeMo 1
            configuration, which does not name it.
        hugging_face: spelling there.
        nemo2: spelling there; None if it has no such models.
        meta: names in Meta's, Mistral's and torchtitan's code; None if they have no such models.
        trtllm: how TensorRT-LLM knows them; None if that is not known.
        nemo1: whether NeMo 1 has such models.
        unmapped: of ``NeMo 1`` and ``NeMo 2``, those that have such models of their own, whose names are not known.
        nemo_speech: how NeMo's speech collection knows them, whose ``.nemo`` is NeMo 1's; None if it does not.
        nemo1_classes: NeMo 1's classes for them other than ``MegatronGPTModel``, without the module, and what these
            take where their configuration has no such key: a value, or a function of the configuration.
        megatron: whether Megatron-Core has such models.
        features: of ``config.model.FEATURES``, those that the family may have; ``yarn`` if its rope may be scaled so.
        recognise: whether a Megatron or NeMo 1 configuration that has the traits is of this family.
        nemo1_keys: keys that NeMo 1 needs for the family beyond the common ones; they replace what is written
            otherwise.
        megatron_keys: the same of Megatron-LM's arguments.
        caveats: what a kind of configuration (``identify.KINDS``) cannot say of a model; each becomes a note.
    """

    name: str
    title: str
    traits: Mapping[str, Any]
    hugging_face: HuggingFace
    nemo2: NeMo2 | None = None
    meta: MetaNames | None = None
    trtllm: TrtLlm | None = None
    nemo1: bool = True
    unmapped: frozenset[str] = frozenset()
    nemo_speech: NeMoSpeech | None = None
    nemo1_classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    megatron: bool = True
    features: frozenset[str] = frozenset()
    recognise: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    nemo1_keys: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})
    megatron_keys: Callable[[ModelConfig], Mapping[str, Any]] = field(default=lambda config: {})
    caveats: Callable[[ModelConfig, str], Iterable[str]] = field(default=lambda config, kind: ())

    @property
    def has_vocabulary(self) -> bool:
        """Whether the models embed tokens; what knows only the spellings takes it that they do."""
        return True
