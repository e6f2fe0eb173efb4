"""What families share whose code is not transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass


@dataclass(eq=False, repr=False, match_args=False)
class RemoteCode(Codec):
    """``auto_map`` of a model whose code lies beside it, and a note where that code is to be had.

    What the source's own ``config.json`` says stays as it is.

    Attributes:
        repository: a model of the family on the Hugging Face hub.
        classes: auto class -> module and class.
    """

    repository: str
    classes: Mapping[str, str]

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if "auto_map" in config.extra.get("hf", {}):
            return {}
        notes.append(
            f"transformers has no class of its own for this family: put the *.py files of {self.repository} beside it"
        )
        return {"auto_map": dict(self.classes)}
