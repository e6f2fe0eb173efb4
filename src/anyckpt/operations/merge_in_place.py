"""Merging an adapter into a base that is named as the adapter is: its tensors change, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.models import Model
from anyckpt.models.adapters import Placed, merged_by_name
from anyckpt.operations.steps.casts import ChangedType
from anyckpt.operations.steps.pipeline import Stepped

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_SHOWN = 5


def is_tied(config: Mapping[str, Any], model: Model | None) -> bool:
    """Whether a model's output layer is its embedding, as far as its configuration tells."""
    if model is not None:
        return model.config.share_embeddings_and_output_weights
    parts = (config, *(part for key in _TEXT_PARTS if isinstance(part := config.get(key), Mapping)))
    return any(part.get("tie_word_embeddings") is True for part in parts)


def merged_in_place(
    base: Checkpoint,
    adapter: Checkpoint,
    found: Placed,
    *,
    scale: float,
    cast: ChangedType,
    model: Model | None,
) -> Stepped:
    """The base with changed tensors under its own names.

    Args:
        base: the model.
        adapter: the adapter as opened; its tokenizer goes with a vocabulary that it resized.
        found: the adapter on the base's tensors.
        scale: every update is multiplied by it.
        cast: element type that a changed tensor gets.
        model: what the base is, None if its family is not known.

    Raises:
        MappingError: a weight is of a type that nothing can be added to.
    """
    tensors = merged_by_name(base.weights(), found, scale=scale, cast=cast)
    notes: list[str] = []
    if model is not None:
        try:
            models.to_hub(base, model, widen=cast.target is not None)
        except MappingError as error:
            notes.append(f"the base is no whole model of family {model.family}, and is merged by its names: {error}")
    prefix = base.model_prefix
    result = replace(base, tensors={**base.tensors, **{prefix + name: tensor for name, tensor in tensors.items()}})
    if found.vocabulary is not None:
        result = _with_vocabulary(result, adapter, *found.vocabulary, notes)
    return Stepped(result, notes=tuple(notes))


def _with_vocabulary(base: Checkpoint, adapter: Checkpoint, before: int, after: int, notes: list[str]) -> Checkpoint:
    """With a configuration that has the resized vocabulary, and the tokenizer of the adapter if it has one."""
    config, changed = resized(base.config, before, after)
    notes.append(f"the vocabulary has {after} rows, as the adapter has it, where the base had {before}")
    if not changed and base.config:
        notes.append(f"no vocab_size of {before} is in the base's configuration: set it to {after} where it is said")
    tokenizer = base.tokenizer
    if adapter.tokenizer is not None:
        tokenizer = adapter.tokenizer
        notes.append("the tokenizer is the adapter's, which is that of the resized vocabulary")
    return replace(base, config=config, tokenizer=tokenizer)


def resized(config: Mapping[str, Any], before: int, after: int) -> tuple[dict[str, Any], bool]:
    """A configuration of Hugging Face's with another vocabulary, and whether it says one."""
    result = dict(config)
    changed = result.get("vocab_size") == before
    if changed:
        result["vocab_size"] = after
    for key in _TEXT_PARTS:
        if isinstance(result.get(key), Mapping):
            result[key], inside = resized(result[key], before, after)
            changed = changed or inside
    return result, changed
