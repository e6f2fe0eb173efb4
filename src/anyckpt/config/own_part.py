"""What of a ``config.json`` is a family's: all of it, the text part of a larger model's, or another code's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.spellings import Spellings

_OF_THE_WHOLE = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
)
"""Keys that a model with several parts says once, beside them."""


def is_known(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json``, or its text part, is of the family."""
    return _is_own(family, config) or text_part(family, config) is not None or _foreign(family, config) is not None


def is_class(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a class of the family's, whatever its ``model_type``."""
    return first_class(config) in family.hugging_face.architectures


def is_part(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether the family's model is the text part of what a ``config.json`` describes."""
    return not _is_own(family, config) and text_part(family, config) is not None


def own_part(family: Spellings, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a ``config.json`` is the family's, in transformers' keys."""
    if _is_own(family, config):
        return config
    part = text_part(family, config)
    if part is not None:
        return {**{key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}, **part}
    return _foreign(family, config) or config


def text_part(family: Spellings, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The text part of a model that also sees or hears."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) and _is_own(family, part) else None


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A ``config.json`` with another vocabulary, in its text part and wherever else it says one."""
    part = config.get("text_config")
    if not isinstance(part, Mapping):
        return {**config, "vocab_size": size}
    outside = {"vocab_size": size} if "vocab_size" in config else {}
    return {**config, **outside, "text_config": {**part, "vocab_size": size}}


def is_foreign(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has the keys of another code than transformers."""
    return not _is_own(family, config) and _foreign(family, config) is not None


def _foreign(family: Spellings, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if "model_type" in config else family.hugging_face.foreign(config)


def first_class(config: Mapping[str, Any]) -> str | None:
    """The class that a ``config.json`` names, if it does."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _is_own(family: Spellings, config: Mapping[str, Any]) -> bool:
    if config.get("model_type") in family.hugging_face.model_types:
        return True
    return "model_type" not in config and is_class(family, config)
