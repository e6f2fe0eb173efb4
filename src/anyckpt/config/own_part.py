"""What of a ``config.json`` is a family's: all of it, the text part of a larger model's, or another code's keys.

A text part is a configuration of its own under a key of the larger one's (``text_config``; Qwen2-VL and Qwen2.5-VL of
transformers 4 have its keys beside the other parts').  Whether its output layer is its embedding says the larger
model, which has that layer: what its part says of it are defaults that nothing follows (transformers 5.24,
``Qwen3VLMoeForConditionalGeneration``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.config.spellings import Spellings

TIED = "tie_word_embeddings"
_OF_THE_WHOLE = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    TIED,
    "quantization_config",
)
"""Keys that a model with several parts says once, beside them."""

_PLACES = (("text_config",), ("llm_config",), ("thinker_config", "text_config"))
"""Keys that lead to a text part: transformers', InternVL's own code's, and of Qwen's that also speak."""

_FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
"""Types of larger models whose own keys may be the text part's, and that part's type."""

Place = tuple[str, ...]


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
        said = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
        tied = {TIED: said[TIED]} if TIED in said else {}
        taken = family.hugging_face.text_parts.get(str(part.get("model_type")), {})
        return {**taken, **said, **part, **tied}
    return _foreign(family, config) or config


def text_part(family: Spellings, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The text part of a model that also sees or hears."""
    return next((part for _, part in _parts(config) if _is_own(family, part)), None)


def any_text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a larger model's ``config.json``, of whatever family; nothing if it has none."""
    return next((part for _, part in _parts(config)), {})


def with_text(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of a larger model with other values in its text part, and beside it where it has the keys."""
    place = next((place for place, _ in _parts(config)), ())
    outside = {key: changed[key] for key in (*_OF_THE_WHOLE, "vocab_size") if key in config and key in changed}
    return {**_changed(config, place, changed), **outside}


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A ``config.json`` with another vocabulary, in its text part and wherever else it says one."""
    return with_text(config, {"vocab_size": size})


def is_foreign(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has the keys of another code than transformers."""
    return not _is_own(family, config) and _foreign(family, config) is not None


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Where a ``config.json`` may have the text part of a larger model, and what is there."""
    for place in _PLACES:
        part = of_place(config, place)
        if isinstance(part, Mapping):
            yield place, part
            return
    of_part = _FLAT.get(str(config.get("model_type")))
    if of_part is not None:
        yield (), {**config, "model_type": of_part}


def of_place(config: Mapping[str, Any], place: Place) -> Any:
    """What keys lead to, one inside the other; None if they do not."""
    part: Any = config
    for key in place:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _changed(config: Mapping[str, Any], place: Place, changed: Mapping[str, Any]) -> dict[str, Any]:
    if not place:
        return {**config, **changed}
    return {**config, place[0]: _changed(config[place[0]], place[1:], changed)}


def _foreign(family: Spellings, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if "model_type" in config else family.hugging_face.foreign(config)


def first_class(config: Mapping[str, Any]) -> str | None:
    """The class that a ``config.json`` names, if it does."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _is_own(family: Spellings, config: Mapping[str, Any]) -> bool:
    known = family.hugging_face
    if config.get("model_type") in (*known.model_types, *known.text_parts):
        return True
    return "model_type" not in config and is_class(family, config)
