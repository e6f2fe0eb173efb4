"""One module of a model alone: its tensors without its name before theirs, and what is known of it.

NeMo's SpeechLM2 models (SALM, DuplexSTT, DuplexS2S) have a language model of transformers in ``llm`` and a speech
encoder in ``perception``.  Of the language model the embedding is kept outside, and so is the output layer where only
the inner model is in ``llm``; NeMo 3.0 reads its configuration from ``llm_backbone/config.json``, and ``lora`` in the
model's own settings is what peft or, with ``use_nemo_automodel``, NeMo Automodel was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UsageError, alike, few
from anyckpt.formats.shared.hub_folder import read_json
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.models.families import of_config
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.globs import matching
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.user_names import new_name, parse_renames
from anyckpt.storage.location import look_in

LLM, PERCEPTION = "llm", "perception"
"""The two of NeMo's SpeechLM2 models."""

_OUTSIDE = ("embed_tokens", "lm_head")
BACKBONE = ("llm_backbone", "config.json")


@dataclass(frozen=True)
class Module:
    """A module of a model, in the words of a conversion's options.

    Attributes:
        include: globs of its tensors.
        rename: what takes its name off theirs.
        config: its configuration, if that is known.
        alpha: that of the LoRA adapter in it.
        has_tokenizer: the tokenizer beside the model is its.
    """

    include: tuple[str, ...]
    rename: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    alpha: float | None = None
    has_tokenizer: bool = False


@dataclass(frozen=True)
class Taken(Stepped):
    """The model without what is said of the whole, and the options that take the module out of it."""

    options: ConvertOptions = field(kw_only=True)


def alone(checkpoint: Checkpoint, name: str, options: ConvertOptions) -> Taken:
    """One module of a checkpoint's model, in place of the whole.

    Args:
        checkpoint: opened.
        name: the module's.
        options: what else the user asks for.

    Raises:
        UsageError: there is no such module.
        FormatError: the configuration beside it is damaged.
    """
    found = _module(checkpoint, name)
    given = options.config is not None or options.model_id is not None
    more = [options.rename] if isinstance(options.rename, str) else options.rename or ()
    named = options.names is not None or options.target.dialect(options.writing) is not None
    adapters = options.target.adapters == options.target.name
    taken = replace(
        options,
        module=None,
        include=found.include,
        rename=(*found.rename, *more),
        config=options.config if given else found.config,
        alpha=found.alpha if options.alpha is None and (named or adapters) else options.alpha,
    )
    beside = [name for name in checkpoint.artifacts if found.config is None or name != "/".join(BACKBONE)]
    if not found.has_tokenizer and checkpoint.tokenizer is not None:
        beside += checkpoint.tokenizer.files
    own = _settings(checkpoint, name)
    bare = replace(
        checkpoint,
        config=own,
        config_kind=checkpoint.config_kind if own else None,
        tokenizer=checkpoint.tokenizer if found.has_tokenizer else None,
        artifacts={},
        details={key: value for key, value in checkpoint.details.items() if key != "metadata"},
    )
    return Taken(bare, dict.fromkeys(beside, f"of the whole model, of which {name} is taken alone"), options=taken)


def _module(checkpoint: Checkpoint, name: str) -> Module:
    names = _names(checkpoint)
    if not any(own.startswith(f"{name}.") for own in names):
        modules = modules_of(names)
        raise UsageError(
            f"the model has no module {name!r}",
            path=checkpoint.path,
            expected=alike(name, modules) or few(list(modules), 8),
            remedy="list what there is with anyckpt inspect --tree",
        )
    if name == LLM and is_speech(names):
        return _language_model(checkpoint, names)
    return Module((f"{_escaped(name)}.*",), (f"{_escaped(name)}.*=*",))


def _settings(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """What NeMo makes the whole of ``perception`` by, which only another of its models reads; nothing of others."""
    section = checkpoint.config.get(name) if name == PERCEPTION and is_speech(_names(checkpoint)) else None
    return dict(section) if isinstance(section, Mapping) else {}


def names_inside(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Own names of a module's weights -> what they are called where the module is alone.

    Raises:
        FormatError: the configuration beside it is damaged.
        UsageError: there is no such module.
    """
    found = _module(checkpoint, name)
    renames = parse_renames(found.rename)
    return {own: new_name(own, "", renames) for own in matching(checkpoint.weights(), found.include)}


def _escaped(name: str) -> str:
    """A name as a glob of it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _names(checkpoint: Checkpoint) -> list[str]:
    """Own names of weights; those of the ranks' shards where they are not joined."""
    names = checkpoint.weights()
    return list(names) if names else [name for shard in checkpoint.ranks for name in shard.tensors]


def modules_of(names: Iterable[str]) -> dict[str, int]:
    """First words of names -> how many names begin so."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        if dot:
            counts[first] = counts.get(first, 0) + 1
    return counts


def is_speech(names: Iterable[str]) -> bool:
    """Whether these are the names of one of SpeechLM2's models."""
    return {LLM, PERCEPTION} <= modules_of(names).keys()


def _language_model(checkpoint: Checkpoint, names: list[str]) -> Module:
    settings = checkpoint.config
    inner = [name.removeprefix(f"{LLM}.") for name in names if name.startswith(f"{LLM}.")]
    wrapper = PREFIX if any(name.startswith(PREFIX) for name in inner) else ""
    model = f"{settings.get('llm_attr_name') or 'model'}."
    whole = any(name.startswith(wrapper + model) for name in inner)
    embedding = settings.get("embed_tokens_attr_name") or _OUTSIDE[0]
    outside = {"embed_tokens": f"{wrapper}{model}{embedding}", "lm_head": f"{wrapper}lm_head"}
    there = modules_of(names)
    rename = [f"{LLM}.{wrapper}*={wrapper}{'' if whole else model}*"]
    rename += [f"{word}.*={inside}.*" for word, inside in outside.items() if word in there]
    return Module(
        (f"{LLM}.*", *(f"{word}.*" for word in outside if word in there)),
        tuple(rename),
        backbone_of(checkpoint),
        _alpha(settings) if any(".lora_" in name for name in inner) else None,
        has_tokenizer=True,
    )


def backbone_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The configuration of the language model that lies beside a SpeechLM2 model; None if none does.

    Raises:
        FormatError: it is damaged.
    """
    location = look_in(checkpoint.place, checkpoint.path)
    return read_json(location.open(*BACKBONE)) if location.is_file(*BACKBONE) else None


def _alpha(settings: Mapping[str, Any]) -> float | None:
    """What updates are multiplied by, over the rank; None where ranks or alphas differ, or nothing says it.

    Where nothing is said, peft 0.19 and Automodel take 8 and 32.
    """
    lora = settings.get("lora")
    if not isinstance(lora, Mapping) or lora.get("alpha_pattern") or lora.get("rank_pattern"):
        return None
    alpha = lora.get("alpha", 32) if settings.get("use_nemo_automodel") else lora.get("lora_alpha", 8)
    rank = lora.get("r", 8) if lora.get("use_rslora") else 1
    if type(alpha) not in (int, float) or type(rank) is not int or rank < 1:
        return None
    return float(alpha) * math.sqrt(rank)


def told_of_modules(checkpoint: Checkpoint) -> list[str]:
    """What ``inspect`` says of what a SpeechLM2 model consists of; nothing of any other model."""
    names = _names(checkpoint)
    if not is_speech(names):
        return []
    counts, settings = modules_of(names), checkpoint.config
    inside = modules_of(name.removeprefix(f"{PERCEPTION}.") for name in names if name.startswith(f"{PERCEPTION}."))
    said = [f"{LLM}{_family(checkpoint)}", f"{PERCEPTION} ({', '.join(inside) or counts[PERCEPTION]})"]
    said += [word for word in counts if word not in (LLM, PERCEPTION, *_OUTSIDE)]
    origins = [str(settings[key])[:80] for key in ("pretrained_llm", "pretrained_asr") if settings.get(key)]
    began = f", from {' and '.join(origins)}" if origins else ""
    return [f"a SpeechLM2 model of NeMo{began}: {', '.join(said)}; convert --module takes one alone"]


def _family(checkpoint: Checkpoint) -> str:
    """What is known of the language model."""
    try:
        config = backbone_of(checkpoint)
    except FormatError as error:
        return f" (its configuration cannot be read: {error.problem})"
    if config is None:
        return " (give its configuration with --config)"
    known = of_config(config)
    return f" (family {known.name})" if known is not None else f" (of type {str(config.get('model_type'))[:80]})"
