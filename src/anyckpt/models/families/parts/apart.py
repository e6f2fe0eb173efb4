"""What families share whose code is not transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.model import ModelConfig


def remote_code(
    config: ModelConfig, notes: list[str], repository: str, classes: Mapping[str, str]
) -> Mapping[str, Any]:
    """``auto_map`` of a model whose code lies beside it, and a note where that code is to be had.

    Args:
        config: the model; what its own ``config.json`` says stays as it is.
        notes: of the conversion.
        repository: a model of the family on the Hugging Face hub.
        classes: auto class -> module and class.
    """
    if "auto_map" in config.extra.get("hf", {}):
        return {}
    notes.append(f"transformers has no class of its own for this family: put the *.py files of {repository} beside it")
    return {"auto_map": dict(classes)}
