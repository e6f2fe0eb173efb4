"""Whether two checkpoints' configurations say the same of their models, whatever they are spelled in."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.config.hugging_face import WITHOUT_MEANING
from anyckpt.config.model import PART_OF
from anyckpt.data_classes import dataclass
from anyckpt.errors import LastingError, few
from anyckpt.models import Model, ModelConfig
from anyckpt.models.adapters import KINDS, settings_of, spelling_of

_OF_TENSORS = {
    "dtype",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "share_embeddings_and_output_weights",
    "extra",
}
"""What the tensors tell, or a layout: these are compared themselves."""
_SPELLINGS = {"dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "architectures"}
_OF_LAYOUT = re.compile(r".*(?:parallel|world_size|padded_vocab_size|vocab_size_divisible_by).*|.*(?:^|_)rank")
_OF_WRITER = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
_OF_TRAINING = {"dropout", "base", "targets"}  # of an adapter: a path, and what tensors tell by their names
_OF_ADAPTERS_TRAINING = re.compile(
    r"peft_version|auto_mapping|base_model_name_or_path|revision|inference_mode|init_\w*weights|target_modules"
    r"|exclude_modules|modules_to_save|layers_to_transform|layers_pattern|(?:\w+_)?dropout"
)
"""Keys of ``adapter_config.json`` that say who wrote it, how it was trained, or what tensors tell by their names."""
_FIELDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rank_stabilized",
    "rank_pattern": "ranks",
    "alpha_pattern": "alphas",
    "fan_in_fan_out": "fan_in_fan_out",
    "trainable_token_indices": "token_indices",
}
_ASIDE = WITHOUT_MEANING | _SPELLINGS
_LONGEST = 80
_SHOWN = 5
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class Setting:
    """What two checkpoints say differently, beside their tensors.

    Attributes:
        name: the hub's word for it, or the stored key with dots.
        a: what the first says, as text; None if nothing.
        b: what the second says.
    """

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Settings:
    """The outcome of comparing configurations.

    Attributes:
        different: what is said differently.
        obstacle: why they are not compared, or not all; None if they are.
        beyond: what two configurations of one framework say differently and no field of the model has: batches,
            paths, and words that mean the same.
    """

    different: tuple[Setting, ...] = ()
    obstacle: str | None = None
    beyond: tuple[Setting, ...] = ()

    def known_to_both(self) -> Settings:
        """Without what only one of the two says, which is an obstacle: conversions lose words for which the target
        has none."""
        alone = [setting for setting in self.different if setting.a is None or setting.b is None]
        if not alone:
            return self
        names = few((setting.name for setting in alone), _SHOWN)
        left = tuple(s for s in self.different if s not in alone)
        return replace(self, different=left, obstacle=f"only one of them says {names}")

    def beyond_the_model(self) -> Iterator[str]:
        """A line on what is beyond the model, if anything is."""
        if self.beyond:
            said = few((f"{s.name} ({_side(s.a)} in A, {_side(s.b)} in B)" for s in self.beyond), _SHOWN)
            yield f"settings that are not of the model: {said}"


def compare_configurations(
    a: Checkpoint, b: Checkpoint, known: tuple[Model, Model] | None = None, *, raw: bool = False
) -> Settings:
    """How the configurations of two checkpoints differ.

    Those of known families are compared by what they mean.  Where frameworks have no word for something, both say the
    same if the one, spelled as the other, is the other: a converted model is equal to its original.

    Args:
        a: a checkpoint.
        b: another.
        known: what models they are, if that is known.
        raw: compare keys as they are stored, but for the writer's version and the type, which the tensors tell.
    """
    first, second = settings_of(a), settings_of(b)
    lacking = [checkpoint.path for checkpoint in (a, b) if not checkpoint.config]
    alone = f"{lacking[0]} has no configuration" if len(lacking) == 1 else None
    if first is not None and second is not None:
        understood = first.kind in KINDS or first.kind != second.kind
        if spelling_of(a) != spelling_of(b):
            return Settings(tuple(_of_translated(first, second)), None if understood else alone)
        said = (*_of_adapters(first, second), *_of_other_kinds(a, b, first, second))
        rest = tuple(_rest_of_adapters(a, b, {setting.name for setting in said}))
        return Settings(said, None if understood else alone, rest)
    if lacking:
        return Settings(obstacle=alone)
    if raw and a.config_kind == b.config_kind:
        return Settings(tuple(_of_keys(a.config, b.config, _OF_WRITER)))
    known = known or _told_alone(a, b)
    if known is not None:
        different = [*_of_models(known[0], known[1], a.config_kind, b.config_kind)]
        if a.config_kind == b.config_kind == "hf":
            different += _outside_text(a.config, b.config, known)
        beyond = tuple(_beyond(a, b, known[0].family, {setting.name for setting in different}))
        return Settings(tuple(different), beyond=beyond).known_to_both()
    if a.config_kind != b.config_kind:
        return Settings(obstacle="the model's family is not known, and the configurations are of different frameworks")
    return Settings(tuple(_of_keys(a.config, b.config, _ASIDE)))


def _told_alone(a: Checkpoint, b: Checkpoint) -> tuple[Model, Model] | None:
    """What models configurations say, whether or not the tensors are such; None if one is of no known family."""
    found = []
    for checkpoint in (a, b):
        bare = Checkpoint("", "", {}, config=checkpoint.config, config_kind=checkpoint.config_kind)
        try:
            model = models.identify(bare)
        except LastingError:
            return None
        if model is None:
            return None
        found.append(model)
    return found[0], found[1]


def _of_adapters(a: AdapterSettings, b: AdapterSettings) -> Iterator[Setting]:
    first, second = asdict(a), asdict(b)
    for name in first:
        one, other = first[name], second[name]
        if name not in _OF_TRAINING and one != other:
            yield Setting(name, _text(one), _text(other))


def _of_other_kinds(a: Checkpoint, b: Checkpoint, first: AdapterSettings, second: AdapterSettings) -> Iterator[Setting]:
    """What adapters of one kind say beyond the settings that are understood: a seed, a form, a size of blocks."""
    if first.kind == second.kind and first.kind not in KINDS and a.config and b.config:
        known = {setting.name for setting in _of_adapters(first, second)}
        for setting in _of_keys(a.config, b.config, ()):
            if not _OF_ADAPTERS_TRAINING.fullmatch(setting.name) and _FIELDS.get(setting.name) not in known:
                yield setting


def _rest_of_adapters(a: Checkpoint, b: Checkpoint, told: set[str]) -> Iterator[Setting]:
    """Keys that no setting tells, such as the base and what was trained beside; PEFT writes sets in any order."""
    if a.config_kind != b.config_kind or not (a.config and b.config):
        return
    for setting in _of_keys(a.config, b.config, ("peft_version",)):
        values = [c.config.get(setting.name) for c in (a, b)]
        lists = [sorted(map(str, value)) for value in values if isinstance(value, list)]
        same_set = len(lists) == 2 and lists[0] == lists[1]
        if not same_set and told.isdisjoint((setting.name, _FIELDS.get(setting.name))):
            yield setting


def _of_translated(a: AdapterSettings, b: AdapterSettings) -> Iterator[Setting]:
    """What adapters of two frameworks both say: modules and patterns are in each one's own words."""
    if a.kind != b.kind:
        yield Setting("kind", a.kind, b.kind)
    scales = [None if s.alpha is None or s.rank is None or s.alphas or s.ranks else _scale(s) for s in (a, b)]
    if None not in scales and scales[0] != scales[1]:
        yield Setting("scale", *map(str, scales))


def _scale(settings: AdapterSettings) -> float:
    assert settings.alpha is not None and settings.rank is not None
    return settings.alpha / (math.sqrt(settings.rank) if settings.rank_stabilized else settings.rank)


def _of_models(a: Model, b: Model, first: str | None, second: str | None) -> Iterator[Setting]:
    if a.family != b.family:
        yield Setting("family", a.family, b.family)
        return
    doubtful = _unlike(a, a.config, b.config)
    if not (a.says_vocabulary and b.says_vocabulary):
        doubtful.discard("vocab_size")
    if doubtful and first != second:
        for one, other, kind in ((a, b, second), (b, a, first)):
            spelled = _respelled(one, kind)
            if spelled is not None:
                doubtful &= _unlike(a, spelled, other.config)
    for field in sorted(doubtful):
        said = [getattr(config, field) for config in (a.config, b.config)]
        silent = field.endswith("_token_id")  # of other fields none is a value: no window, no scaling
        yield Setting(field, *(None if silent and value is None else _text(value) for value in said))


def _unlike(model: Model, a: ModelConfig, b: ModelConfig) -> set[str]:
    return {
        field.name
        for field in fields(model.config)
        if field.name not in _OF_TENSORS and getattr(a, field.name) != getattr(b, field.name)
    }


def _respelled(model: Model, kind: str | None) -> ModelConfig | None:
    """What is left of a model's configuration in another framework's spelling; None if that cannot say it."""
    try:
        config = models.render_config(model, kind or "")
    except LastingError:
        return None
    again = _identified(config, kind, model.family)
    return None if again is None else again.config


def _identified(config: Mapping[str, Any], kind: str | None, family: str) -> Model | None:
    """The model that a configuration alone tells of; None if none."""
    try:
        return models.identify(Checkpoint("", "", {}, config=dict(config), config_kind=kind), family=family)
    except LastingError:
        return None


def _beyond(a: Checkpoint, b: Checkpoint, family: str, told: set[str]) -> Iterator[Setting]:
    """What two configurations of one kind say differently and no difference that is told comes of.

    Of keys that tensors overrule this is so, too: whether embeddings are tied, what normalizes.  What only one of two
    ``config.json`` has is mostly a default that another release writes.
    """
    if a.config_kind != b.config_kind:
        return
    by_key: dict[str, list[Setting]] = {}
    for setting in _of_keys(a.config, b.config, _ASIDE):
        both = setting.a is not None and setting.b is not None
        if setting.name not in told and (both or a.config_kind != "hf"):
            by_key.setdefault(setting.name.partition(".")[0], []).append(setting)
    before = _identified(a.config, a.config_kind, family) if by_key else None
    for key, settings in by_key.items():
        config = {name: value for name, value in a.config.items() if name != key}
        after = _identified({**config, key: b.config[key]} if key in b.config else config, a.config_kind, family)
        if before is None or after is None or told.isdisjoint(_unlike(before, before.config, after.config)):
            yield from settings


def _outside_text(a: Mapping[str, Any], b: Mapping[str, Any], known: tuple[Model, Model]) -> Iterator[Setting]:
    """Keys of two ``config.json`` that no field of a model has: other parts, and what the family does not read."""
    wholes = [model.config.extra.get(PART_OF) for model in known]
    if wholes[0] != wholes[1]:
        yield Setting("model_type", _text(a.get("model_type")), _text(b.get("model_type")))
        return
    left = [model.config.extra.get("hf", {}) for model in known]
    yield from _of_keys(left[0], left[1], _ASIDE)
    if wholes[0] is not None:
        outside = [{key: value for key, value in config.items() if key != "text_config"} for config in (a, b)]
        yield from _of_keys(outside[0], outside[1], _ASIDE)


def _of_keys(a: Mapping[str, Any], b: Mapping[str, Any], without: Container[str]) -> Iterator[Setting]:
    """Keys, with dots, that have different values; no key, null, false and nothing in it are the same."""
    for name in dict.fromkeys((*a, *b)):
        one, other = a.get(name), b.get(name)
        if name in without or (without is _ASIDE and _OF_LAYOUT.fullmatch(str(name))):
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for inner in _of_keys(one, other, without):
                yield replace(inner, name=f"{name}.{inner.name}")
        elif one != other and not (_is_nothing(one) and _is_nothing(other)):
            yield Setting(str(name), _text(one) if name in a else None, _text(other) if name in b else None)


def _is_nothing(value: Any) -> bool:
    return any(value is nothing or (value == nothing and type(value) is type(nothing)) for nothing in _NOTHING)


def _side(said: str | None) -> str:
    return "not said" if said is None else said


def _text(value: Any) -> str:
    """A value in a line."""
    shown = repr(value) if not isinstance(value, str) else value
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
