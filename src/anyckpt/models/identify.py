"""Which family a checkpoint's model is of, from whatever configuration there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config import hugging_face as config_hf
from anyckpt.config import hybrid, nemo1, nemo2, nemo_speech, own_part
from anyckpt.config import megatron as config_megatron
from anyckpt.config import meta as config_meta
from anyckpt.config import trtllm as config_trtllm
from anyckpt.config.model import WHOLE_NORMS, ModelConfig
from anyckpt.errors import LastingError, MappingError, UsageError
from anyckpt.models.families import by_name, each_family, of_config
from anyckpt.models.hub import Model
from anyckpt.models.language.family import Family
from anyckpt.models.told_by_tensors import megatron_names, with_facts_from_tensors
from anyckpt.tensor import LazyTensor

if TYPE_CHECKING:
    from anyckpt.layout.partition import Partition

KINDS = ("hf", "nemo1", "nemo2", "megatron-args")
"""Spellings of a configuration that say all of a model."""

META = "meta"
"""That of Meta's ``params.json``, which says sizes, and leaves tokens and lengths to the code."""

TRTLLM = "trtllm"
"""That of TensorRT-LLM's ``config.json``, which says what its engine needs, and leaves tokens out."""

_TRANSFORMER = {"num_layers", "hidden_size", "num_attention_heads"}
"""Without these, arguments or a NeMo 1 configuration are of no transformer."""


def config_kind(config: Mapping[str, Any]) -> str | None:
    """Which of ``KINDS`` a configuration is, from its keys; None if none."""
    inner = config.get("config")
    if "_target_" in config or (isinstance(inner, Mapping) and "_target_" in inner):
        return "nemo2"
    if config_trtllm.is_trtllm(config):
        return TRTLLM
    if "num_hidden_layers" in config or ("model_type" in config and "architectures" in config):
        return "hf"
    if config_meta.is_params(config):
        return META
    if nemo_speech.is_speech(config):
        return "nemo1"
    unwrapped = nemo1.unwrapped(config)
    if "transformer_impl" in config and "mcore_gpt" not in config:
        return "megatron-args"  # those of encoder-decoders have an encoder_seq_length, too
    if unwrapped.keys() & {"encoder_seq_length", "mcore_gpt", "rotary_percentage", "megatron_amp_O2"}:
        return "nemo1"
    if {"num_layers", "num_attention_heads"} <= config.keys():
        return "megatron-args"
    return None if of_config(config) is None else "hf"


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a family that we know, but has the keys of another code than transformers."""
    return "model_type" not in config and any(own_part.is_foreign(family, config) for family in each_family())


def identify(
    checkpoint: Checkpoint, *, family: str | None = None, config: Mapping[str, Any] | None = None
) -> Model | None:
    """The model that a checkpoint holds, or None if its family is unknown.

    Args:
        checkpoint: opened; only its configuration, names and shapes are looked at.
        family: name of the family, if the user says it.
        config: a configuration of any of ``KINDS`` that replaces the checkpoint's.

    Raises:
        MappingError: the family is known and the configuration is not one of it, or there is none although the
            user names the family.
        UsageError: no such family, or a configuration of no known kind.
    """
    chosen = None if family is None else by_name(family)
    values = checkpoint.config if config is None else config
    kind = checkpoint.config_kind if config is None else config_kind(config)
    if config is not None and kind is None:
        raise UsageError(
            "the configuration given is of no known kind",
            expected="the keys of a config.json, a NeMo model_config.yaml or model.yaml, Megatron arguments, Meta's "
            "params.json, or TensorRT-LLM's config.json",
            found=", ".join(map(str, list(config)[:5])),
        )
    if kind not in (*KINDS, META, TRTLLM) or not values:
        if chosen is None:
            return None
        raise MappingError(
            "has no configuration, and names alone do not tell a model's heads",
            path=checkpoint.path,
            remedy="give one with --config",
        )
    notes: list[str] = []
    found: tuple[Family, ModelConfig] | None
    if kind == META:
        weights = checkpoint.weights()
        meta = chosen or _first(lambda family: config_meta.is_of(family, values))
        found = None if meta is None else (meta, config_meta.parse(meta, values, weights, notes))
    elif kind == TRTLLM:
        known = chosen or _first(lambda family: config_trtllm.is_of(family, values))
        found = None if known is None else (known, config_trtllm.parse(known, values, notes))
    elif kind == "hf":
        of = chosen or _of_hugging_face(values)
        notes.extend([] if of is None else _taken_as(of, values))
        found = None if of is None else (of, config_hf.parse(of, values))
    else:
        found = _parse(kind, values, chosen, _parts(checkpoint.weights()))
        letters = hybrid.letters_of(values) if kind == "megatron-args" else None
        if found is not None and letters is not None and found[1].hybrid_override_pattern is None:
            notes.append(
                f"{found[1].num_layers} blocks are {len(letters)} layers of a HybridModel: attention, then MLP"
            )
    if found is None:
        return None
    definition, parsed = found
    model = Model(definition.name, parsed, definition, tuple(notes))
    return with_facts_from_tensors(model, checkpoint, kind, values)


def partitions(checkpoint: Checkpoint, *, family: str | None = None) -> Mapping[str, str | Partition]:
    """How a checkpoint's family says that tensor parallelism divides its tensors, for ``layout.join`` and ``cut``.

    Args:
        checkpoint: opened, of ranks or whole; only its configuration and names are looked at.
        family: name of the family, if the user says it.

    Returns:
        Hub name with ``*`` for every number -> kind; nothing of a model of no known family, nor where all is as the
        table of names says.

    Raises:
        UsageError: no such family.
    """
    if family is not None:
        return by_name(family).partitions
    if checkpoint.config_kind not in KINDS:
        return {}
    if checkpoint.config_kind == "hf":
        known = _of_hugging_face(checkpoint.config)
        return {} if known is None else known.partitions
    weights = {name: tensor for shard in checkpoint.ranks for name, tensor in shard.tensors.items()}
    try:
        found = _parse(checkpoint.config_kind, checkpoint.config, None, _parts(weights or checkpoint.weights()))
    except LastingError:
        return {}  # of which ``identify`` tells where the family is needed
    return {} if found is None else found[0].partitions


def _first(is_of: Callable[[Family], bool]) -> Family | None:
    """The first family that a configuration is of."""
    return next(filter(is_of, each_family()), None)


def _of_hugging_face(values: Mapping[str, Any]) -> Family | None:
    """The family that ``model_type`` says, or that the class says whose type is of no family."""
    return of_config(values) or _first(lambda family: own_part.is_class(family, values))


def _taken_as(family: Family, values: Mapping[str, Any]) -> list[str]:
    """What to say where a ``config.json`` is not by its type of the family that it is taken for.

    Raises:
        MappingError: its models compute something else.
    """
    if own_part.is_known(family, values):
        return []
    told, known = values.get("model_type"), _first(lambda other: own_part.is_known(other, values))
    if known is not None:
        differing = {k: v for k, v in family.traits.items() if k in known.traits and known.traits[k] != v}
        if differing:
            key, value = next(iter(differing.items()))
            raise MappingError(
                f"config.json's model_type {told!r} is of family {known.name}, whose models compute something else "
                f"than those of {family.name}",
                expected=f"{key} {value}",
                found=f"{key} {known.traits[key]}",
                remedy="leave --family out",
            )
        return [f"config.json's model_type {told!r} is of family {known.name}: taken as {family.name} as you say"]
    if own_part.is_class(family, values):
        return [f"config.json's model_type {told!r} is of no family: taken as {family.name}, whose class it names"]
    return [
        f"config.json's model_type {str(told)[:80]!r} is of no family: names and shapes fit {family.name}, but only "
        "you know that it computes the same"
    ]


_STACKS = ("encoder.layers.", "decoder.layers.")
_OTHERS = ("embedding.word_embeddings.", "conv1.")


def _parts(weights: Mapping[str, LazyTensor]) -> frozenset[str]:
    """Which of the parts that tell kinds of models apart Megatron names have; none for other names."""
    known = megatron_names(weights)
    return frozenset(part for part in (*_STACKS, *_OTHERS) if any(name.startswith(part) for name in known))


def _has_parts(family: Family, parts: frozenset[str]) -> bool:
    """Whether a family's models have these parts, and layers in no other stack."""
    own = {part for part in (*_STACKS, *_OTHERS) if any(rule.hub.startswith(part) for rule in family.rules)}
    stacks = parts & {*_STACKS}
    return parts <= own and (not stacks or stacks == own & {*_STACKS})


def _parse(
    kind: str, values: Mapping[str, Any], chosen: Family | None, parts: frozenset[str]
) -> tuple[Family, ModelConfig] | None:
    """The family and the configuration of a Megatron or NeMo model."""
    if kind == "nemo2":
        name = nemo2.nemo2_class(values) or ""
        named = [chosen] if chosen else [f for f in each_family() if f.nemo2 is not None and f.nemo2.reads(name)]
        candidates = [(family, nemo2.parse(family, values)) for family in named]
        fitting = [(f, config) for f, config in candidates if f.recognise(config) and not _wrong_traits(f, config)]
        if not candidates:
            return None
        family, config = candidates[0] if len(candidates) == 1 or not fitting else fitting[0]
        if chosen is None and not family.recognise(config) and _wrong_traits(family, config):
            return None  # another model of the same class
        _check_traits(family, config)
        return family, config
    if kind == "nemo1" and nemo_speech.is_speech(values):
        heard = chosen or _first(lambda family: nemo_speech.spelling_of(family, values) is not None)
        return None if heard is None else (heard, nemo_speech.parse(heard, values))
    inner = with_class_defaults(nemo1.unwrapped(values)) if kind == "nemo1" else values
    if chosen is None and not inner.keys() >= _TRANSFORMER:
        return None
    if kind == "nemo1":
        return _by_traits(nemo1.parse(inner), inner, chosen, parts, kind)
    as_gpt = hybrid.gpt_arguments(inner)
    if hybrid.letters_of(inner) is not None and not _is_of_hybrids(inner, chosen):
        found = _by_traits(config_megatron.parse(as_gpt), as_gpt, chosen, parts, kind)
        if found is not None:
            return found
    return _by_traits(config_megatron.parse(inner), inner, chosen, parts, kind)


def _is_of_hybrids(values: Mapping[str, Any], chosen: Family | None) -> bool:
    """Whether the user or the arguments name a family whose own layers are attention or MLP."""
    hint = values.get("hf_model_type")
    named = chosen or _first(lambda family: hint in family.hugging_face.model_types)
    return named is not None and hybrid.PATTERN in named.features


def with_class_defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's part of a NeMo 1 configuration with what its class takes where it says nothing."""
    name = str(values.get("target")).rpartition(".")[2]
    for family in each_family():
        if name in family.nemo1_classes:
            defaults = {key: at(values) if callable(at) else at for key, at in family.nemo1_classes[name].items()}
            return {**values, **{key: value for key, value in defaults.items() if values.get(key) is None}}
    return values


def _by_traits(
    config: ModelConfig, values: Mapping[str, Any], chosen: Family | None, parts: frozenset[str], kind: str
) -> tuple[Family, ModelConfig] | None:
    """Megatron and NeMo 1 do not name the family: it is the one whose traits the configuration has."""
    if chosen is not None:
        own = _of_family(chosen, config, values, kind)
        _check_traits(chosen, own)
        return chosen, own
    hint = values.get("hf_model_type")
    for family in each_family():
        own = _of_family(family, config, values, kind)
        named = hint in family.hugging_face.model_types or (hint is None and family.recognise(own))
        if named and not _wrong_traits(family, own) and _has_parts(family, parts):
            return family, own
    return None


def _of_family(family: Family, config: ModelConfig, values: Mapping[str, Any], kind: str) -> ModelConfig:
    """The configuration as that of a family, which may store norms in another way than this kind of checkpoint."""
    marker = family.whole_norms.get(kind)
    if marker is None or not values.get(marker) or config.layernorm_zero_centered_gamma:
        return replace(config, family=family.name)
    extra = {**config.extra, WHOLE_NORMS: True}
    return replace(config, family=family.name, layernorm_zero_centered_gamma=True, extra=extra)


def _wrong_traits(family: Family, config: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Field, expected and found of whatever the family cannot be."""
    features = config.extra.get("features", {})
    strange = [(name, "none", value) for name, value in features.items() if name not in family.features]
    traits = ((name, value, getattr(config, name)) for name, value in family.traits.items())
    return strange + [(name, expected, found) for name, expected, found in traits if found != expected]


def _check_traits(family: Family, config: ModelConfig) -> None:
    for name, expected, found in _wrong_traits(family, config):
        raise MappingError(
            f"the configuration's {name} is not that of family {family.name}",
            expected=expected,
            found=str(found)[:80],
            remedy="choose another --family",
        )
