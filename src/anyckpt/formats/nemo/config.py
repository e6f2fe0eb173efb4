"""``model_config.yaml``: what it says about the model, and the files of the archive that it refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

ARTIFACT_SCHEME = "nemo:"
"""A text that begins with this names a member of the archive (NeMo's ``register_artifact``)."""

GPT_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that ``restore_from`` builds from a Megatron GPT configuration."""

NEMO_VERSION = "2.0.0"
"""Written where the configuration has none: the last release with ``MegatronGPTModel``, so the newest that fits."""

_GPT_KEYS = ("num_layers", "hidden_size", "num_attention_heads")


def is_megatron_config(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a Megatron GPT-like model, which has these at its top level."""
    return all(type(config.get(key)) is int for key in _GPT_KEYS)


def texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in a configuration, with the keys and indices that lead to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts(item, (*path, index))


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a configuration with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, change) for item in value]
    return value


def missing_artifacts(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Dotted key -> member, for each ``nemo:`` reference to a member that the archive lacks."""
    known = set(names)
    return {
        ".".join(map(str, path)): text[len(ARTIFACT_SCHEME) :]
        for path, text in texts(config)
        if text.startswith(ARTIFACT_SCHEME) and text[len(ARTIFACT_SCHEME) :] not in known
    }


def referenced_names(config: dict[str, Any]) -> set[str]:
    """Members that the configuration refers to: ``nemo:`` references, and the bare base names of older archives."""
    return {text.removeprefix(ARTIFACT_SCHEME).rpartition("/")[2] for _, text in texts(config)}
