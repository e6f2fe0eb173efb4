"""Rope that is another one, or not scaled, in layers with a window: transformers 5's parameters by kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

_WHAT = "config.json's rope_parameters"


@dataclass(eq=False, repr=False, match_args=False)
class LocalTheta(Codec):
    """Theta of layers with a window, in either spelling; scaling of rope is for the others alone.

    Attributes:
        theta: what it is where no key says.
        key: of older files; it may be that of all layers.
    """

    theta: float
    key: str

    hubs = ("rotary_base_local",)

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, "rope_parameters")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        nested = Reader(reader.mapping("rope_parameters"), _WHAT).mapping("sliding_attention")
        local = Reader(nested, _WHAT)
        if local.values.get("rope_type", "default") != "default":
            raise MappingError(
                "config.json scales rope in layers with a window, which the family does not",
                expected="rope_type default",
                found=repr(local.values["rope_type"])[:80],
            )
        return {"rotary_base_local": local.number("rope_theta") or reader.number(self.key) or self.theta}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        local = config.rotary_base_local or self.theta
        scaled = {"rope_theta": config.rotary_base, **(config.rope_scaling or {"rope_type": "default"})}
        plain = {"rope_theta": local, "rope_type": "default"}
        return {self.key: local, "rope_parameters": {"full_attention": scaled, "sliding_attention": plain}}
