"""From an opened adapter to the hub's updates, with the scale that its settings say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.errors import FormatError, MappingError, UsageError, about
from anyckpt.models.adapters import loose, megatron, peft, peft_names
from anyckpt.models.adapters.adapter import Adapter
from anyckpt.models.adapters.by_name import Placed, placed, unplaced, without_tied_copies
from anyckpt.models.adapters.layers import Layers
from anyckpt.models.adapters.wrapped import is_wrapped
from anyckpt.tensor import LazyTensor

KINDS = ("lora", "dora")
"""Kinds of adapters that are understood."""

_LONGEST_PATTERN = 200
_MOST_REPEATS = 3


def spelling_of(checkpoint: Checkpoint) -> str | None:
    """``peft``, ``megatron`` or one of ``loose.SPELLINGS`` if a checkpoint is an adapter with such names, else None."""
    names = checkpoint.weights()
    if peft_names.is_adapter(names):
        return "peft" if checkpoint.dialect == "peft" or not is_wrapped(names) else None
    if megatron.is_adapter(names):
        return "megatron"
    if checkpoint.dialect == "peft" and names:  # of whole tensors alone
        return "peft"
    return loose.spelling(names)


def settings_of(checkpoint: Checkpoint) -> AdapterSettings | None:
    """What an adapter says of itself, or that it says nothing; None if the checkpoint is no adapter.

    A file of tensors has no settings: names tell that it is an adapter.
    """
    if checkpoint.adapter is not None:
        return checkpoint.adapter
    spelled = spelling_of(checkpoint)
    if spelled in loose.SPELLINGS:
        return loose.settings(checkpoint)
    return None if spelled is None else AdapterSettings()


def read_adapter(checkpoint: Checkpoint, settings: AdapterSettings, layers: Layers | None) -> Adapter:
    """The updates that a checkpoint holds; every tensor of it is used once.

    Args:
        checkpoint: an adapter, of whatever naming.
        settings: its own, or with the alpha that the user says.
        layers: the base model's weights; None if its family is not known, which Megatron's names do not need.

    Raises:
        MappingError: tensors are missing, of no rule, of another base model, or not what the settings say.
        UsageError: the scale is not known, or the base model is needed and not known.
    """
    weights = checkpoint.weights()
    with about(checkpoint.path):
        if not weights:
            raise MappingError("the adapter has no tensors", remedy="copy the whole adapter")
        spelled = spelling_of(checkpoint)
        if spelled in loose.SPELLINGS:
            weights = loose.as_peft(weights)
        if spelled != "megatron":
            if layers is None:
                raise UsageError(
                    "the adapter's names are Hugging Face's, and without the base model's configuration nothing says "
                    "which of Megatron's weights they are",
                    remedy="give the base model's config.json, or its folder, with --config",
                )
            found = peft.from_peft(
                weights, lambda module, rank: scale_of(settings, module, rank), layers, settings.token_indices
            )
            _check_magnitudes(found, settings)
            return found
        config = None if layers is None else layers.model.config
        return megatron.from_megatron(
            weights,
            lambda weight, rank: scale_of(settings, weight, rank, exact=".experts." not in weight),
            None if config is None else config.num_moe_experts,
            None if config is None else config.gated_linear_unit,
        )


def place_by_name(
    checkpoint: Checkpoint, settings: AdapterSettings, base: Mapping[str, LazyTensor], *, tied: bool
) -> tuple[Placed | None, list[str]]:
    """An adapter on the tensors of a base that is named as the adapter is; None if it is not, and what it has not.

    Args:
        checkpoint: an adapter.
        settings: its own, or with the alpha that the user says.
        base: the base's weights by stored name.
        tied: whether the base's output layer is its embedding.

    Raises:
        MappingError: tensors are missing, fit several of the base's, or are of another base model.
        UsageError: the scale is not known.
    """
    weights = checkpoint.weights()
    spelled = spelling_of(checkpoint)
    if spelled is None or spelled == "megatron":
        return None, []
    with about(checkpoint.path):
        if spelled in loose.SPELLINGS:
            weights = loose.as_peft(weights)
        stored = peft_names.by_module(weights)
        find = loose.finder(spelled, base).find
        if tied:
            without_tied_copies(stored, weights, find)
        missing = unplaced(stored, find)
        if missing:
            return None, missing
        found = placed(
            stored, weights, base, settings, lambda module, rank: scale_of(settings, module, rank), find, tied=tied
        )
        _check_magnitudes(found.adapter, settings)
        return found, []


def check_adapter(checkpoint: Checkpoint) -> list[str]:
    """Check an adapter by itself, without its base model: every update has both factors, and they fit together.

    Returns:
        What is odd and may be right.

    Raises:
        MappingError: they do not, or a tensor is not an adapter's.
    """
    weights = checkpoint.weights()
    if not weights:
        raise MappingError("the adapter has no tensors", remedy="copy the whole adapter")
    spelled = spelling_of(checkpoint)
    if spelled == "numbered":
        return loose.check_numbered(weights)
    if spelled in loose.SPELLINGS:
        weights = loose.as_peft(weights)
    if spelled != "megatron":
        diagonal = peft_names.check_pairs(weights, blocks=checkpoint.adapter is None)
        if diagonal:
            return [
                f"{diagonal[0]}: its second factor has fewer columns than the first has rows, which is right only for "
                "block-diagonal factors (BD-LoRA), and there is no adapter_config.json to say so"
            ]
    else:
        megatron.from_megatron(weights, lambda weight, rank: 1.0, experts=1)  # how many share one is no matter here
    return []


def _check_magnitudes(adapter: Adapter, settings: AdapterSettings) -> None:
    """Raise MappingError unless every module has its lengths of rows, or none has, as PEFT's settings say."""
    names = {update.magnitude is not None: update.names[0] for update in adapter.updates.values()}
    wanted = None if settings.rank is None else settings.kind == "dora"  # without a rank there are no settings
    if len(names) < 2 and (wanted is None or not names or wanted in names):
        return
    every = wanted is not False
    raise MappingError(
        "the adapter's settings and tensors contradict each other on DoRA",
        tensor=names[not every],
        expected=f"a lora_magnitude_vector in {'every' if every else 'no'} module",
        found="one without" if every else "one with it",
        remedy="copy configuration and tensors of one adapter",
    )


def scale_of(settings: AdapterSettings, module: str, rank: int, *, exact: bool = True) -> float:
    """What the update of a module is multiplied by.

    Args:
        settings: the adapter's.
        module: its name, for the patterns.
        rank: that of its tensors.
        exact: the settings' rank must be that; Megatron's experts may have a smaller one.

    Raises:
        MappingError: the settings say another rank.
        UsageError: they say no alpha.
    """
    alpha = _matching(settings.alphas, module, settings.alpha)
    stated = _matching(settings.ranks, module, settings.rank)
    if alpha is None:
        raise UsageError(
            "the adapter does not say its alpha, so its scale is not known",
            expected="adapter_config.json or the like",
            remedy=f"give it with --alpha; some libraries take the rank, {rank}, where a file says none",
        )
    if exact and stated is not None and stated != rank:
        raise MappingError(
            "the adapter's settings and tensors contradict each other on the rank",
            tensor=module,
            expected=stated,
            found=rank,
            remedy="copy configuration and tensors of one adapter",
        )
    return alpha / math.sqrt(rank) if settings.rank_stabilized else alpha / rank


def _matching(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    return next((value for pattern, value in patterns.items() if _compiled(pattern).fullmatch(module)), default)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """PEFT's meaning of a pattern: a regular expression of the end of a module's name, from a dot on.

    Raises:
        FormatError: it is none, or one that could take forever.
    """
    repeats = sum(pattern.count(sign) for sign in "*+{")
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{?]", pattern):
        raise FormatError(
            "a pattern of module names is too complicated", expected="a module's name", found=repr(pattern[:80])
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except re.error as error:
        raise FormatError(f"a pattern of module names is not valid: {error}", found=repr(pattern[:80])) from None


def with_alpha(settings: AdapterSettings, alpha: float | None) -> AdapterSettings:
    """The settings with the alpha that the user says, for all modules.

    Raises:
        UsageError: it is not a number that scales anything.
    """
    if alpha is None:
        return settings
    if not math.isfinite(alpha):
        raise UsageError("--alpha must be a number", found=alpha)
    return replace(settings, alpha=alpha, alphas={})
