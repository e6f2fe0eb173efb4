"""What a ``config.json`` says that the hub has no fields for, of families which go to containers alone.

Such keys are a family's ``carried`` ones: they stay in its configuration as they are, and sizes are read from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.defaults import of_class
from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import LARGEST, impossible
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class Carried:
    """Carried keys of a family.

    Attributes:
        model_type: whose class says what it means that a key is absent.
    """

    model_type: str

    def reader(self, config: ModelConfig) -> Reader:
        """The keys of a model, with what its class takes for those that are absent."""
        return Reader({**of_class("transformers", self.model_type), **config.extra.get("hf", {})}, "config.json")

    def size(self, config: ModelConfig, key: str) -> int:
        """A size, or 0 if the model has no such thing.

        Raises:
            MappingError: it is none that a model can have.
        """
        value = self.reader(config).integer(key) or 0
        if not 0 <= value < LARGEST:
            raise impossible(key, "a size", value)
        return value

    def flag(self, config: ModelConfig, key: str) -> bool:
        """Whether something is so."""
        return bool(self.reader(config).flag(key))


@dataclass(eq=False, repr=False, match_args=False)
class RopeByLayer(Codec):
    """Rope as transformers 5 tells it, by kind of layer, of a family of which nothing but ``config.json`` tells it."""

    hubs = ("rope_scaling",)
    keys = ("rope_parameters",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"rope_scaling": dict(reader.mapping("rope_parameters")) or None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {} if config.rope_scaling is None else {"rope_parameters": dict(config.rope_scaling)}
