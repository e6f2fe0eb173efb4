"""What tensors mean: model families, the hub's names, Megatron's dialects, and configurations.

``identify`` tells the model, ``to_hub`` brings its weights to the hub's names, ``from_hub`` to any other naming, and
``render_config`` spells its configuration for any framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config import hugging_face as config_hf
from anyckpt.config import megatron as config_megatron
from anyckpt.config import meta as config_meta
from anyckpt.config import nemo1, nemo2
from anyckpt.config import trtllm as config_trtllm
from anyckpt.config.model import ModelConfig
from anyckpt.errors import UsageError
from anyckpt.models.bare_names import bare_names
from anyckpt.models.families import by_name, known_families
from anyckpt.models.from_hub import from_hub
from anyckpt.models.hub import Hub, Model, Named
from anyckpt.models.identify import KINDS, config_kind, identify, partitions, with_class_defaults
from anyckpt.models.language.family import Family
from anyckpt.models.to_hub import to_hub

__all__ = [
    "KINDS",
    "Family",
    "Hub",
    "Model",
    "ModelConfig",
    "Named",
    "bare_names",
    "by_name",
    "config_kind",
    "from_hub",
    "identify",
    "known_families",
    "partitions",
    "render_config",
    "to_hub",
    "with_class_defaults",
]

_RENDERERS: dict[str, Callable[[Family, ModelConfig, list[str]], dict[str, Any]]] = {
    "hf": config_hf.render,
    "nemo1": nemo1.render,
    "nemo2": nemo2.render,
    "megatron-args": config_megatron.render,
    "meta": config_meta.render,
    "trtllm": config_trtllm.render,
}


def render_config(
    model: Model, kind: str, *, extra: Mapping[str, Any] | None = None, notes: list[str] | None = None
) -> dict[str, Any]:
    """A model's configuration in a framework's spelling, as plain data for JSON or YAML.

    Args:
        model: the model.
        kind: ``hf`` (``config.json``), ``nemo1`` (``model_config.yaml``), ``nemo2`` (the ``_target_`` and ``config``
            of ``model.yaml``), ``megatron-args``, ``meta`` (``params.json``) or ``trtllm`` (TensorRT-LLM's
            ``config.json``).
        extra: keys to add or replace at the top level.
        notes: what the framework cannot say is appended here.

    Raises:
        MappingError: the framework cannot express the model.
        UsageError: no such kind.
    """
    if kind not in _RENDERERS:
        raise UsageError(f"unknown kind of configuration {kind!r}", expected=f"one of {', '.join(_RENDERERS)}")
    said: list[str] = [] if notes is None else notes
    tied = model.config.share_embeddings_and_output_weights and kind not in model.definition.unties
    config = replace(model.config, share_embeddings_and_output_weights=tied)
    rendered = _RENDERERS[kind](model.definition, config, said)
    if kind in KINDS:
        said.extend(model.definition.caveats(model.config, kind))
    if kind != "hf":
        lost = config_hf.surplus(model.config)
        if lost:
            said.append(f"keys of config.json that the {kind} configuration has no place for: {', '.join(lost)}")
    if kind != "meta" and (lost := config_meta.surplus(model.config)):
        said.append(f"keys of params.json that the {kind} configuration has no place for: {', '.join(lost)}")
    return {**rendered, **(extra or {})}
