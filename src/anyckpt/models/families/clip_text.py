"""The text transformer of CLIP, alone or with its projection: what most diffusion models read their prompts with.

Transformers 4 always has ``text_model.`` before the names, transformers 5 only in the class with the projection.
Checked against transformers 5.24.  NVIDIA has such a tower only as part of a whole CLIP, so that the family goes to
containers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, class_of
from anyckpt.config.fields import Codec, Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.data_classes import dataclass
from anyckpt.indexing import Shape
from anyckpt.models.families import clip_vision
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.modules import norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule, has

PREFIX = "text_model."
_LAYER = f"{PREFIX}encoder.layers.*"
_RULES = (
    Rule((f"{PREFIX}embeddings.token_embedding.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule(
        (f"{PREFIX}embeddings.position_embedding.weight",),
        "embedding.position_embeddings.weight",
        ("positions", "hidden"),
    ),
    *clip_vision.layers(
        (f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"),
        {
            "output": f"{_LAYER}.self_attn.out_proj",
            "fc1": f"{_LAYER}.mlp.fc1",
            "fc2": f"{_LAYER}.mlp.fc2",
            "before": f"{_LAYER}.layer_norm1",
            "after": f"{_LAYER}.layer_norm2",
        },
    ),
    *norm(f"{PREFIX}final_layer_norm", "decoder.final_layernorm."),
)
RULES = tuple(replace(rule, hub=rule.hub.replace("decoder.", "encoder.", 1)) for rule in _RULES)
"""Megatron's names of an encoder, for those of a decoder would be GPT-2's."""
PROJECTION = Rule(
    ("text_projection.weight",),
    "text_projection.weight",
    ("output", "hidden"),
    when=has("output_dim"),
    partition="alone",
)
IGNORABLE = tuple(
    (f"{prefix}embeddings.position_ids", "numbers of positions, which follow from the configuration")
    for prefix in ("", PREFIX)
)
TRAITS = {**decoder.LEARNED_TRAITS, "share_embeddings_and_output_weights": True}
_LEFT = ("num_query_groups", "kv_channels", "share_embeddings_and_output_weights")
FIELDS = (
    *(row for row in COMMON if row.hub not in _LEFT),
    Field("layernorm_epsilon", "layer_norm_eps", "number"),
)


@dataclass(eq=False, repr=False, match_args=False)
class Projection(Codec):
    """The projection of the class that has one.

    Attributes:
        stem: what the names of classes begin with.
    """

    stem: str

    hubs = ("output_dim",)
    keys = ("projection_dim",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        width = reader.integer("projection_dim")
        projects = class_of(reader).endswith("WithProjection")
        return {"output_dim": (512 if width is None else width) if projects else None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if config.output_dim is None:
            return {"architectures": [self.stem]}
        return {"projection_dim": config.output_dim, "architectures": [f"{self.stem}WithProjection"]}


def _refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    projection = shapes.get("text_projection.weight", ())
    return replace(config, output_dim=projection[0] if config.output_dim is None and projection else config.output_dim)


FAMILY = Family(
    name="clip-text",
    title="CLIP's text transformer",
    rules=(*RULES, PROJECTION),
    ignorable=IGNORABLE,
    traits=TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    refine=_refine,
    dimensions={"output": lambda config: config.output_dim or 0},
    hugging_face=HuggingFace(
        model_types=("clip_text_model",),
        architectures=("CLIPTextModel", "CLIPTextModelWithProjection"),
        fields=FIELDS,
        attention_bias=None,
        codecs=(Projection("CLIPTextModel"), Implied({"share_embeddings_and_output_weights": True})),
        prefix=PREFIX,
        headless=lambda config: config.output_dim is None,
    ),
)
