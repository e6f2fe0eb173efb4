"""The vision transformer of CLIP, alone or with its projection.

Megatron-Core's CLIPViTModel has no norm behind its layers and no projection: models around it do.  They keep their own
names here, so that a model comes back whole.  Transformers 4 always has ``vision_model.`` before the names,
transformers 5 only in the class with the projection.  Checked by equal outputs in Megatron-Core 0.16's CLIPViTModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Fixed, Implied, Written, class_of
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.indexing import Shape
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import INTERLEAVED_QKV, Leading
from anyckpt.models.language.rules import Rule, has

_PREFIX = "vision_model."
_LAYER = f"{_PREFIX}encoder.layers.*"
HUB = "decoder.layers.*"
PARTS = ("weight", "bias")


def layers(query_key_value: Iterable[str], names: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules of a layer of a vision transformer.

    Args:
        query_key_value: patterns of these modules.
        names: patterns of ``output``, ``fc1``, ``fc2``, and of the norms ``before`` attention and ``after`` it.
    """
    attention, mlp = f"{HUB}.self_attention", f"{HUB}.mlp"
    return (
        *norm(names["before"], f"{attention}.linear_qkv.layer_norm_"),
        *norm(names["after"], f"{mlp}.linear_fc1.layer_norm_"),
        *linear(tuple(query_key_value), f"{attention}.linear_qkv", ("qkv", "hidden"), INTERLEAVED_QKV),
        *linear(names["output"], f"{attention}.linear_proj", ("hidden", "attention")),
        *linear(names["fc1"], f"{mlp}.linear_fc1", ("fc1", "hidden")),
        *linear(names["fc2"], f"{mlp}.linear_fc2", ("hidden", "ffn")),
    )


_EMBEDDINGS = f"{_PREFIX}embeddings"
RULES = (
    Rule((f"{_EMBEDDINGS}.class_embedding",), "class_token", ("one", "class-tokens", "hidden"), Leading(2)),
    Rule((f"{_EMBEDDINGS}.patch_embedding.weight",), "conv1.weight", ("hidden", "colours", "patch", "patch")),
    Rule((f"{_EMBEDDINGS}.position_embedding.weight",), "position_embeddings.weight", ("patches", "hidden")),
    *norm(f"{_PREFIX}pre_layrnorm", "ln_pre."),
    *layers(
        (f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"),
        {
            "output": f"{_LAYER}.self_attn.out_proj",
            "fc1": f"{_LAYER}.mlp.fc1",
            "fc2": f"{_LAYER}.mlp.fc2",
            "before": f"{_LAYER}.layer_norm1",
            "after": f"{_LAYER}.layer_norm2",
        },
    ),
    *norm(f"{_PREFIX}post_layernorm", "post_layernorm.", has("add_post_layernorm")),
    Rule(("visual_projection.weight",), "visual_projection.weight", ("output", "hidden"), when=has("output_dim")),
)  # fmt: skip

DIMENSIONS: Mapping[str, Callable[[ModelConfig], int]] = {
    "class-tokens": lambda config: config.class_token_len or 0,
    "colours": lambda config: 3,
    "patch": lambda config: config.patch_dim or 0,
    "patches": lambda config: config.patches,
    "output": lambda config: config.output_dim or 0,
}
TRAITS = {
    **decoder.LEARNED_TRAITS,
    "transformer_block_type": "pre_ln",
}
FIELDS = (
    Field("num_layers", "num_hidden_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "intermediate_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("patch_dim", "patch_size"),
    Field("init_method_std", "initializer_range", "number", 0.02),
    Field("layernorm_epsilon", "layer_norm_eps", "number"),
)


@dataclass(eq=False, repr=False, match_args=False)
class Image(Codec):
    """Sizes of an image.

    Attributes:
        square: transformers' class takes no other images.
    """

    square: bool

    hubs = ("img_h", "img_w", "class_token_len")
    keys = ("image_size",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        size = reader.values.get("image_size")
        pair = reader.pair("image_size") if isinstance(size, (list, tuple)) else None
        height, width = pair or (reader.integer("image_size") or defaults["image_size"],) * 2
        return {"img_h": height, "img_w": width, "class_token_len": 1}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        same = config.img_h == config.img_w
        if config.class_token_len != 1 or (self.square and not same):
            raise MappingError(
                "transformers' class takes no such images",
                expected=f"{'squares and ' if self.square else ''}one class token",
                found=f"{config.img_h} x {config.img_w}, {config.class_token_len} class tokens",
            )
        return {"image_size": config.img_h if same else [config.img_h, config.img_w]}


COLOURS = Fixed({"num_channels": 3}, "that of Megatron-Core's CLIPViTModel", "integer")


def megatron_keys(config: ModelConfig) -> Mapping[str, Any]:
    """Arguments that Megatron-LM needs: an image's tokens are its sequence."""
    return {"seq_length": config.patches, "max_position_embeddings": config.patches}


class _Projection(Codec):
    """The projection of the class that has one, and the norm behind the layers, which both have."""

    hubs = ("output_dim",)
    keys = ("projection_dim",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        width = reader.integer("projection_dim")
        projects = class_of(reader).endswith("WithProjection")
        return {"output_dim": (512 if width is None else width) if projects else None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if not config.add_post_layernorm:
            raise MappingError(
                "transformers' CLIPVisionModel has a norm behind its layers, which Megatron-Core's CLIPViTModel has "
                "not",
                expected="post_layernorm.weight and post_layernorm.bias among the tensors",
                remedy="convert the whole model that it is a part of, or to another of Megatron's or NeMo's formats",
            )
        if config.output_dim is None:
            return {"architectures": ["CLIPVisionModel"]}
        return {"projection_dim": config.output_dim, "architectures": ["CLIPVisionModelWithProjection"]}


def _refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    projection = shapes.get("visual_projection.weight", ())
    return replace(
        config,
        add_post_layernorm=config.add_post_layernorm or any(f"post_layernorm.{part}" in shapes for part in PARTS),
        output_dim=projection[0] if config.output_dim is None and projection else config.output_dim,
    )


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    if kind != "hf":
        outside = ["post_layernorm"] * config.add_post_layernorm + ["visual_projection"] * bool(config.output_dim)
        if outside:
            yield f"CLIPViTModel has no {' and no '.join(outside)}: kept under that name for the model around it"


FAMILY = Family(
    name="clip-vision",
    title="CLIP's vision transformer",
    rules=RULES,
    ignorable=tuple(
        (f"{prefix}embeddings.position_ids", "numbers of positions, which follow from the configuration")
        for prefix in ("", _PREFIX)
    ),
    traits={**TRAITS, "vision_model_type": "clip"},
    nemo1=False,
    refine=_refine,
    megatron_keys=megatron_keys,
    caveats=_caveats,
    dimensions=DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("clip_vision_model",),
        architectures=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        fields=(*FIELDS, Field("attention_dropout", "attention_dropout", "number")),
        attention_bias=None,
        codecs=(
            COLOURS,
            Image(square=True),
            Implied({"vision_model_type": "clip", "add_post_layernorm": True}),
            _Projection(),
        ),
        prefix=_PREFIX,
        headless=lambda config: config.output_dim is None,
    ),
    nemo2=NeMo2(
        module="nemo.collections.vlm.vision.clip_vit",
        model="CLIPViTModel",
        configs=("CLIPViTConfig", "CLIPViTL_14_336_Config"),
        choose=lambda config: "CLIPViTL_14_336_Config",
        implied={"share_embeddings_and_output_weights": False},
        fields=(
            Field("patch_dim", "patch_dim"),
            Field("img_h", "img_h"),
            Field("img_w", "img_w"),
            Field("class_token_len", "class_token_len"),
            Field("vision_model_type", "vision_model_type", "text"),
        ),
        codecs=(
            Implied({"max_position_embeddings": None}),
            Written({"add_qkv_bias": True, "add_class_token": True}, hubs=("add_qkv_bias",)),
        ),
        without=frozenset({
            "seq_length", "vocab_size", "share_embeddings_and_output_weights", "make_vocab_size_divisible_by",
            "position_embedding_type", "rotary_base", "rotary_percent", "seq_len_interpolation_factor",
        }),
    ),
)  # fmt: skip
