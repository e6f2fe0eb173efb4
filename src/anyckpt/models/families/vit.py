"""ViT, alone, with a pooler, or with a classifier.

NVIDIA has no converter for it.  Its layers are those of Megatron-Core's CLIPViTModel of subtype ``internvit``, whose
convolution has a bias and which has no norm before its layers, with the plain layers of a vision transformer: checked
by equal outputs there, in 0.16.  What is behind the layers keeps its own names.  Transformers 5 has other names in
memory than on disk; both are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, class_of
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.indexing import Shape
from anyckpt.models.families import clip_vision
from anyckpt.models.families.clip_vision import PARTS
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import Leading
from anyckpt.models.language.rules import Rule, has

_LAYER = "vit.encoder.layer.*"
_EMBEDDINGS = "vit.embeddings"


RULES = (
    Rule((f"{_EMBEDDINGS}.cls_token",), "class_token", ("one", "class-tokens", "hidden")),
    *linear(f"{_EMBEDDINGS}.patch_embeddings.projection", "conv1", ("hidden", "colours", "patch", "patch")),
    Rule((f"{_EMBEDDINGS}.position_embeddings",), "position_embeddings.weight", ("patches", "hidden"), Leading(-1)),
    *clip_vision.layers(
        (f"{_LAYER}.attention.attention.{name}" for name in ("query", "key", "value")),
        {
            "output": f"{_LAYER}.attention.output.dense",
            "fc1": f"{_LAYER}.intermediate.dense",
            "fc2": f"{_LAYER}.output.dense",
            "before": f"{_LAYER}.layernorm_before",
            "after": f"{_LAYER}.layernorm_after",
        },
    ),
    *norm("vit.layernorm", "layernorm."),
    *linear("vit.pooler.dense", "pooler.dense", ("output", "hidden"), when=has("add_pooler")),
    *linear("classifier", "classifier", ("classes", "hidden"), when=has("num_classes")),
)  # fmt: skip

_IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
"""Transformers 5's names in a layer, and those on disk."""


class _Heads(Codec):
    """Pooler and classifier, by the class."""

    hubs = ("add_pooler", "output_dim", "num_classes")
    keys = ("num_labels", "pooler_output_size")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = class_of(reader)
        classes = len(reader.mapping("id2label")) or reader.integer("num_labels") or 2
        pooled = kind.endswith("Model")
        width = reader.integer("pooler_output_size") or found["hidden_size"]
        return {
            "add_pooler": pooled,
            "output_dim": width if pooled else None,
            "num_classes": classes if kind.endswith("ForImageClassification") else None,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        written = {} if config.output_dim is None else {"pooler_output_size": config.output_dim}
        if config.num_classes is None:
            return {**written, "architectures": ["ViTModel"]}
        labelled = "id2label" in config.extra.get("hf", {})
        labels = {} if labelled else {"num_labels": config.num_classes}
        return {**written, **labels, "architectures": ["ViTForImageClassification"]}


def _refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """A bare model may lack the pooler; what the tensors have besides the configuration's heads is taken, too."""
    pooled = any(f"pooler.dense.{part}" in shapes for part in PARTS)
    classes = next((shapes[name][0] for name in ("classifier.weight", "classifier.bias") if shapes.get(name)), None)
    width = next((shapes[name][0] for name in ("pooler.dense.weight", "pooler.dense.bias") if shapes.get(name)), None)
    if not shapes:
        return config
    return replace(
        config,
        add_pooler=pooled,
        output_dim=(config.output_dim or width) if pooled else None,
        num_classes=config.num_classes if config.num_classes is not None else classes,
    )


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    if kind != "hf":
        outside = ["layernorm", *["pooler"] * config.add_pooler, *["classifier"] * (config.num_classes is not None)]
        yield f"CLIPViTModel has no {', no '.join(outside)}: kept under that name for the model around it"


FAMILY = Family(
    name="vit",
    title="ViT",
    rules=RULES,
    traits={**clip_vision.TRAITS, "vision_model_type": "internvit"},
    nemo1=False,
    refine=_refine,
    megatron_keys=clip_vision.megatron_keys,
    caveats=_caveats,
    dimensions={**clip_vision.DIMENSIONS, "classes": lambda config: config.num_classes or 0},
    hugging_face=HuggingFace(
        model_types=("vit",),
        architectures=("ViTModel", "ViTForImageClassification"),
        fields=(
            *clip_vision.FIELDS,
            Field("attention_dropout", "attention_probs_dropout_prob", "number"),
            Field("hidden_dropout", "hidden_dropout_prob", "number"),
        ),
        constants={"qkv_bias": True},
        expected={"qkv_bias": True},
        attention_bias=None,
        codecs=(
            clip_vision.COLOURS,
            clip_vision.Image(square=False),
            Implied({"vision_model_type": "internvit"}),
            _Heads(),
        ),
        prefix="vit.",
        headless=lambda config: config.num_classes is None,
        variants=tuple(
            Variant(f"vit.layers.*.{new}.{part}", (f"{_LAYER}.{old}.{part}",), in_memory=True)
            for new, old in _IN_MEMORY.items()
            for part in PARTS
        ),
    ),
)
