"""A module of a model with the weights of another model in their place, and the settings that go with them.

Names and shapes must be the same, so that nothing is lost or left untrained in silence.  What may differ is what an
ASR model has not of SpeechLM2's ``perception`` (NeMo 3.0): the adapter and projection behind the encoder stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError, few
from anyckpt.formats.shared.hub_folder import json_text, read_json
from anyckpt.operations.steps.model_module import BACKBONE, LLM, PERCEPTION, is_speech, names_inside
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor

_HEARING = ("encoder", "preprocessor")
_WRAPPED = "encoder_multilayer."
_FEATURES = "preprocessor"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NOT_OF_FEATURES = frozenset({"dither", "pad_to", "nb_augmentation_prob", "use_torchaudio", "rng"})
_SHOWN = 3


def put_in(model: Checkpoint, name: str, other: Checkpoint) -> Stepped:
    """The model with the other's weights in the place of those of one module.

    Args:
        model: with whole tensors; its names are those that the module has.
        name: the module's.
        other: a model that has such a module, is one, or, for ``perception``, has an encoder.

    Raises:
        MappingError: names or shapes do not fit.
        UsageError: the model has no such module.
    """
    speech = is_speech(model.weights())
    own = {inner.removeprefix(_WRAPPED): stored for stored, inner in names_inside(model, name).items()}
    if speech and name == LLM and any(".lora_" in inner for inner in own):
        raise UsageError(
            "has a LoRA adapter in its language model, which was trained for the weights that it has",
            path=model.path,
            remedy="take the language model out with --module llm, which merges it",
        )
    start, theirs = _beginning(other, name, own)
    hears = speech and name == PERCEPTION and not _words(theirs) & (_words(own) - {*_HEARING})
    if speech and name == LLM and _HEAD in own and _HEAD not in theirs and _EMBEDDING in theirs:
        theirs[_HEAD] = theirs[_EMBEDDING]  # tied, and stored once
    stays = {inner for inner in own if hears and inner.partition(".")[0] not in _HEARING}
    surplus = {inner for inner in theirs if hears and inner.partition(".")[0] not in _HEARING}
    placed = {inner: theirs[inner] for inner in theirs if inner not in surplus}
    tensors = model.weights()
    _check_fit(model, name, other, {inner: tensors[own[inner]] for inner in own if inner not in stays}, placed)
    prefix = model.model_prefix
    changed = replace(
        model,
        tensors={**model.tensors, **{prefix + own[inner]: tensor for inner, tensor in placed.items()}},
    )
    notes = [_told(name, other, placed, stays)]
    notes += _types(name, placed, {inner: tensors[own[inner]] for inner in placed})
    if speech and name == LLM:
        changed = _with_backbone(changed, other, notes)
    else:
        words = sorted(_words(placed)) if hears else None
        changed = _with_sections(changed, name, other, start, words, notes)
        if name.rpartition(".")[2] == "encoder":
            notes += _other_features(changed, name, other, start)
    used = {id(tensor) for tensor in placed.values()}
    left = [stored for stored, tensor in other.weights().items() if id(tensor) not in used]
    left += [*other.artifacts, *(other.tokenizer.files if other.tokenizer is not None else ())]
    reason = f"{name} has no place for it"
    return Stepped(changed, {f"{other.path}: {what}": reason for what in left}, tuple(notes))


def _words(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _beginning(other: Checkpoint, name: str, own: Mapping[str, str]) -> tuple[str, dict[str, LazyTensor]]:
    """What the names of the module begin with in the other model, and its tensors without that."""
    weights, steps = other.weights(), name.split(".")
    starts = [".".join(steps[first:]) + "." for first in range(len(steps))]
    for start in (*starts, ""):
        inside = {
            stored[len(start) :].removeprefix(_WRAPPED): tensor
            for stored, tensor in weights.items()
            if stored.startswith(start)
        }
        if inside.keys() & own.keys():
            return start, inside
    raise MappingError(
        f"has nothing of the names in the model's {name}",
        path=other.path,
        expected=f"such as {few(own, _SHOWN)}, alone or behind {starts[0]}",
        found=few(weights, _SHOWN),
        remedy="compare anyckpt inspect --tree of both",
    )


def _check_fit(
    model: Checkpoint,
    name: str,
    other: Checkpoint,
    wanted: Mapping[str, LazyTensor],
    given: Mapping[str, LazyTensor],
) -> None:
    """Raise MappingError unless names and shapes are the same."""
    told = []
    for what, names in (
        ("lacks", [inner for inner in wanted if inner not in given]),
        ("has besides", [inner for inner in given if inner not in wanted]),
    ):
        if names:
            told.append(f"it {what} {few(names, _SHOWN)}")
    others = [
        f"{inner} {list(given[inner].shape)} for {list(tensor.shape)}"
        for inner, tensor in wanted.items()
        if inner in given and given[inner].shape != tensor.shape
    ]
    if others:
        told.append(f"of other shapes: {few(others, _SHOWN)}")
    if told:
        raise MappingError(
            f"does not fit into the model's {name}",
            path=other.path,
            expected=f"the {len(wanted)} tensors of {model.path} by names and shapes",
            found="; ".join(told),
            remedy="only a module of the same sizes can be put in",
        )


def _told(name: str, other: Checkpoint, placed: Mapping[str, LazyTensor], stays: Collection[str]) -> str:
    counts: dict[str, int] = {}
    for inner in placed:
        word = inner.partition(".")[0]
        counts[word] = counts.get(word, 0) + 1
    parts = ", ".join(f"{count} of {word}" for word, count in list(counts.items())[:8])
    kept = ", ".join(sorted(_words(stays)))
    rest = f"; {kept} ({len(stays)} tensors), which it has not, is as before" if kept else ""
    same = f"{len(placed)} tensors are those of {other.path}, all of the same names and shapes ({parts})"
    return f"--put {name}: {same}{rest}"


def _types(name: str, given: Mapping[str, LazyTensor], before: Mapping[str, LazyTensor]) -> list[str]:
    kinds: dict[str, int] = {}
    for inner, tensor in given.items():
        if tensor.dtype != before[inner].dtype:
            change = f"{tensor.dtype.name} where {before[inner].dtype.name} was"
            kinds[change] = kinds.get(change, 0) + 1
    return [f"--put {name}: {count} tensors are {change}: --dtype casts" for change, count in kinds.items()]


def _with_backbone(model: Checkpoint, other: Checkpoint, notes: list[str]) -> Checkpoint:
    """With the language model's configuration, where NeMo reads it."""
    file, given = "/".join(BACKBONE), other.config if other.config_kind == "hf" else {}
    stored = model.artifacts.get(file)
    if stored is None or not given:
        origin = model.config.get("pretrained_llm")
        said = f" {str(origin)[:80]!r}" if origin else ""
        notes.append(
            f"--put {LLM}: the configuration stays as it is: NeMo makes the language model by that of pretrained_llm"
            f"{said}, which must be the same as that of {other.path}"
        )
        return model
    before = read_json(stored)
    notes += _changes(f"--put {LLM}: {file}", before, given)
    source = stored if before == given else MemorySource(json_text(given).encode(), file)
    return replace(model, artifacts={**model.artifacts, file: source})


def _with_sections(
    model: Checkpoint, name: str, other: Checkpoint, start: str, words: Sequence[str] | None, notes: list[str]
) -> Checkpoint:
    """With what the other's configuration says of the module."""
    inner = tuple(start.rstrip(".").split(".")) if start else ()
    own = tuple(name.split("."))
    pairs = [(own, inner)] if words is None else [((*own, word), (*inner, word)) for word in words]
    config, silent = dict(model.config), []
    for ours, theirs in pairs:
        before, given = _section(config, ours), _section(other.config, theirs)
        if given is not None and not theirs and _HEARING[0] not in given:  # that of a whole model
            given = None
        if given is None or before is None:
            silent.append(".".join(ours))
            continue
        notes += _changes(f"--put {name}: {'.'.join(ours)}", before, given)
        config = _replaced(config, ours, given)
    if silent and model.config:
        notes.append(
            f"--put {name}: what the configuration says of {', '.join(silent)} stays as it is, for nothing is known of "
            f"{other.path}'s: it must be the same"
        )
    elif silent:
        notes.append(
            f"--put {name}: there is no configuration here: what it says of {', '.join(silent)} elsewhere must be what "
            f"{other.path}'s does"
        )
    return replace(model, config=config)


def _section(config: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any] | None:
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _replaced(config: Mapping[str, Any], keys: Sequence[str], section: Mapping[str, Any]) -> dict[str, Any]:
    first, *rest = keys
    return {**config, first: _replaced(config[first], rest, section) if rest else dict(section)}


def _changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What another section says otherwise."""
    told = [
        f"{key} {_value(before, key)} becomes {_value(after, key)}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]
    return [f"{what}: {few(told)}"] if told else []


def _value(section: Mapping[str, Any], key: str) -> str:
    return repr(section[key])[:60] if key in section else "(not said)"


def _other_features(model: Checkpoint, name: str, other: Checkpoint, start: str) -> list[str]:
    """That an encoder was trained on other features than the model makes for it."""
    own = _section(model.config, (*name.split(".")[:-1], _FEATURES))
    theirs = _section(other.config, (*start.split(".")[:-2], _FEATURES)) if start else None
    if own is None or theirs is None:
        return []
    differ = [
        f"{key} {_value(own, key)} here, {_value(theirs, key)} there"
        for key in dict.fromkeys((*own, *theirs))
        if own.get(key) != theirs.get(key) and key not in _NOT_OF_FEATURES
    ]
    if not differ:
        return []
    return [f"--put {name}: {other.path} makes other features for its encoder: {few(differ)}; put {_FEATURES} in, too"]
