"""The vision transformer of SigLIP, alone: no token of a class, and a head that pools by attention.

Transformers 4 always has ``vision_model.`` before the names, transformers 5 not.  Checked against transformers 5.24.
NVIDIA has such a tower only as part of larger models, which carry it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.indexing import Shape
from anyckpt.models.families import clip_vision
from anyckpt.models.families.parts.modules import alone, linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule, has

PREFIX = "vision_model."
_EMBEDDINGS, _HEAD = f"{PREFIX}embeddings", f"{PREFIX}head"
_POOLS = has("add_pooler")

RULES = (
    *linear(f"{_EMBEDDINGS}.patch_embedding", "conv1", ("hidden", "colours", "patch", "patch")),
    Rule((f"{_EMBEDDINGS}.position_embedding.weight",), "position_embeddings.weight", ("patches", "hidden")),
    *(rule for rule in clip_vision.RULES if "*" in rule.hub),
    *norm(f"{PREFIX}post_layernorm", "post_layernorm."),
    *alone(
        Rule((f"{_HEAD}.probe",), "pooler.probe", ("one", "one", "hidden"), when=_POOLS),
        Rule(
            (f"{_HEAD}.attention.in_proj_weight",), "pooler.attention.in_proj_weight", ("three-hidden", "hidden"),
            when=_POOLS,
        ),
        Rule((f"{_HEAD}.attention.in_proj_bias",), "pooler.attention.in_proj_bias", ("three-hidden",), when=_POOLS),
        *linear(f"{_HEAD}.attention.out_proj", "pooler.attention.out_proj", ("hidden", "hidden"), when=_POOLS),
        *norm(f"{_HEAD}.layernorm", "pooler.layernorm.", _POOLS),
        *linear(f"{_HEAD}.mlp.fc1", "pooler.mlp.fc1", ("fc1", "hidden"), when=_POOLS),
        *linear(f"{_HEAD}.mlp.fc2", "pooler.mlp.fc2", ("hidden", "ffn"), when=_POOLS),
    ),
)  # fmt: skip


class _Image(Codec):
    """Sizes of an image, without a token besides those of its patches."""

    hubs = ("img_h", "img_w", "class_token_len")
    keys = ("image_size",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**clip_vision.Image(square=False).read(reader, defaults, found), "class_token_len": None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        same = config.img_h == config.img_w
        return {"image_size": config.img_h if same else [config.img_h, config.img_w]}


def _refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """Models that see with this tower take it without its head, whatever its configuration says."""
    if not shapes or any(name.startswith("pooler.") for name in shapes):
        return config
    return replace(config, add_pooler=False)


FAMILY = Family(
    name="siglip-vision",
    title="SigLIP's vision transformer",
    rules=RULES,
    ignorable=clip_vision.FAMILY.ignorable,
    traits=clip_vision.TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    refine=_refine,
    dimensions={**clip_vision.DIMENSIONS, "three-hidden": lambda config: 3 * config.hidden_size},
    hugging_face=HuggingFace(
        model_types=("siglip_vision_model",),
        architectures=("SiglipVisionModel",),
        fields=(
            *clip_vision.FIELDS,
            Field("attention_dropout", "attention_dropout", "number"),
            Field("add_pooler", "vision_use_head", "flag", True),
        ),
        attention_bias=None,
        codecs=(clip_vision.COLOURS, _Image(), Implied({"vision_model_type": "siglip"})),
        prefix=PREFIX,
        headless=lambda config: True,
    ),
)
