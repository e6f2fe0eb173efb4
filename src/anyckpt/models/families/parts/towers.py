"""Models of two towers that are trained together, one for text and one for images, each of a family of its own.

A whole model's fields are those of the tower that reads; those of the one that sees are in ``ModelConfig.towers``.
Names of its tensors in the hub have ``vision_model.`` before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config import hugging_face
from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

TEXT, VISION = "text_config", "vision_config"
_OF_THE_WHOLE = ("family", "dtype", "towers", "extra", "output_dim")
_OF_CLASSES = ("architectures", "dtype", "torch_dtype", "use_cache")


def of_vision(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of the tower that sees, of a whole model."""
    moved = [replace(rule, hub=f"vision_model.{rule.hub}", tower=VISION) for rule in rules]
    return tuple(rule if "*" in rule.hub else replace(rule, partition="alone") for rule in moved)


@dataclass(eq=False, repr=False, match_args=False)
class Towers(Codec):
    """The configurations of both, each under a key, as ``config.json`` of its own family says them.

    Attributes:
        families: by key.
    """

    families: Mapping[str, Family]

    @property
    def hubs(self) -> tuple[str, ...]:
        return ("towers", *(name for name in ModelConfig.__dataclass_fields__ if name not in _OF_THE_WHOLE))

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.families, *(f"{key}_dict" for key in self.families))

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        towers = {
            key: hugging_face.parse(family, {**self._stated(reader, key), "model_type": self._type(key)})
            for key, family in self.families.items()
        }
        text = vars(towers[TEXT])
        return {**{key: value for key, value in text.items() if key not in _OF_THE_WHOLE}, "towers": towers}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        reads = {key: value for key, value in vars(config).items() if key not in _OF_THE_WHOLE}
        towers = {**config.towers, TEXT: replace(config.towers[TEXT], **reads)}
        rendered = {
            key: hugging_face.render(family, replace(towers[key], dtype=None), notes)
            for key, family in self.families.items()
        }
        return {
            key: {name: value for name, value in said.items() if name not in _OF_CLASSES}
            for key, said in rendered.items()
        }

    def _stated(self, reader: Reader, key: str) -> Mapping[str, Any]:
        """Of older files ``text_config_dict`` is the one that counts where it is there (transformers 5.24)."""
        return reader.mapping(f"{key}_dict") or reader.mapping(key)

    def _type(self, key: str) -> str:
        return self.families[key].hugging_face.model_types[0]
