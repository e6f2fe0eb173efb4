"""A model by its name: the configuration that it stands for, and whether the source's says the same."""

from __future__ import annotations

import os
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model_ids import configuration_of
from anyckpt.errors import MappingError
from anyckpt.operations.steps.configurations import compare_configurations
from anyckpt.operations.steps.user_files import read_config

_OF_TOKENIZERS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_OF_TRAINING = ("hidden_dropout", "attention_dropout", "init_method_std", "max_position_embeddings")
"""What a model was fine-tuned with is its own; no tensor depends on it."""


def named_configuration(model_id: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of a model by its id, or that of a folder of NeMo 2 given in place of one.

    Raises:
        UsageError: the id is not known.
        FormatError: the folder has no configuration.
    """
    if os.path.isdir(model_id):
        return read_config(model_id) or {}
    return configuration_of(os.fspath(model_id))


def check_agreement(source: Checkpoint, given: dict[str, Any], model_id: str) -> None:
    """Raise MappingError where the source's own configuration describes another model than the id names.

    Args:
        source: what is read.
        given: the configuration that the id stands for.
        model_id: how the user named it.
    """
    if not source.config:
        return
    bare = Checkpoint(model_id, "nemo2", {}, config=given, config_kind="nemo2")
    own = Checkpoint(source.path, source.format, {}, config=source.config, config_kind=source.config_kind)
    named = models.identify(bare)
    told = models.identify(own, family=None if named is None else named.family)
    if named is None or told is None:
        return
    found = compare_configurations(own, bare, (told, named))
    different = [item for item in found.different if item.name not in (*_OF_TOKENIZERS, *_OF_TRAINING)]
    if different:
        raise MappingError(
            f"the configuration is not that of {model_id}",
            path=source.path,
            expected=", ".join(f"{item.name} {item.b}" for item in different),
            found=", ".join(f"{item.name} {item.a}" for item in different),
            remedy="leave --model-id out, so that the checkpoint's own configuration counts, or give another id",
        )
