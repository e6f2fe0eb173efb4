"""CLIP's vision transformer and ViT: prefixes, heads, images, and what they cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.encoder_cases import BERT, CLIP, T5, VIT, made, reidentified, renamed

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models.dialects import spellings
from anyckpt.tensor import from_array


def test_clip_with_a_prefix() -> None:
    """As transformers 4 stores it, in the class with the projection and in that without."""
    checkpoint, model = made({**CLIP, "architectures": ["CLIPVisionModel"]})
    old = renamed(checkpoint.tensors, lambda name: f"vision_model.{name}")
    old["vision_model.embeddings.position_ids"] = from_array(np.arange(17)[None])
    hub = models.to_hub(with_weights(checkpoint, old, "hf"), reidentified(checkpoint, old))
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    assert list(hub.ignored) == ["vision_model.embeddings.position_ids"]
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)


def test_a_projection_that_only_the_tensors_tell() -> None:
    checkpoint = made({**CLIP, "architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 24})[0]
    silent = replace(checkpoint, config={**CLIP, "projection_dim": 24})
    again = reidentified(silent, checkpoint.tensors)
    assert again.config.output_dim == 24
    assert models.render_config(again, "hf")["architectures"] == ["CLIPVisionModelWithProjection"]
    less = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "visual_projection.weight"}
    with pytest.raises(MappingError, match="visual_projection.weight"):
        models.to_hub(with_weights(checkpoint, less, "hf"), reidentified(checkpoint, less))


def test_a_clip_without_what_is_behind_its_layers() -> None:
    """As NVIDIA's importer to NeMo 2 leaves it: fit for Megatron's formats, not for transformers."""
    checkpoint, model = made(CLIP)
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo2").tensors
    left = {name: tensor for name, tensor in named.items() if "post_layernorm" not in name}
    rendered = models.render_config(model, "nemo2")
    assert rendered["config"]["_target_"].endswith("clip_vit.CLIPViTL_14_336_Config")
    between = replace(with_weights(checkpoint, left), config=rendered, config_kind="nemo2")
    again = models.identify(between)
    assert again is not None
    assert not again.config.add_post_layernorm
    assert "class_token" in models.to_hub(between, again).tensors
    with pytest.raises(MappingError, match="a norm behind its layers"):
        models.render_config(again, "hf")


def test_vit_as_transformers_5_has_it_in_memory() -> None:
    for architecture in ("ViTModel", "ViTForImageClassification"):
        checkpoint = made({**VIT, "architectures": [architecture]})[0]
        prefix = "vit." if architecture == "ViTForImageClassification" else ""
        words = {
            f"{prefix}encoder.layer.": f"{prefix}layers.", "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        }  # fmt: skip

        def in_memory(name: str, words: dict[str, str] = words) -> str:
            for old, new in words.items():
                name = name.replace(old, new)
            return name

        new = renamed(checkpoint.tensors, in_memory)
        assert new.keys() != checkpoint.tensors.keys()
        hub = models.to_hub(with_weights(checkpoint, new, "hf"), reidentified(checkpoint, new))
        assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)
        assert spellings.detect(new) == "hf"


def test_heads_of_a_vit() -> None:
    labels = {str(number): f"label {number}" for number in range(7)}
    checkpoint, model = made({**VIT, "architectures": ["ViTForImageClassification"], "id2label": labels})
    assert checkpoint.tensors["classifier.weight"].shape == (7, 32)
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    rendered = models.render_config(model, "megatron-args")
    again = models.identify(replace(with_weights(checkpoint, named), config=rendered, config_kind="megatron-args"))
    assert again is not None
    assert models.render_config(again, "hf")["num_labels"] == 7
    assert "num_labels" not in models.render_config(model, "hf"), "of which there are names"
    silent = reidentified(replace(checkpoint, config=VIT), checkpoint.tensors)
    assert (silent.config.num_classes, silent.config.add_pooler) == (7, False)


def test_images_that_are_not_square() -> None:
    config = made({**VIT, "image_size": [16, 24]})[1].config
    assert (config.img_h, config.img_w, config.patches) == (16, 24, 25)
    assert models.render_config(made({**VIT, "image_size": [16, 24]})[1], "hf")["image_size"] == [16, 24]
    with pytest.raises(MappingError, match="no such images"):
        models.render_config(made({**CLIP, "image_size": [16, 24]})[1], "hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CLIP, "image_size": 18}, "img_h is not covered by patches"),
        ({**CLIP, "image_size": -4}, "img_h is not possible"),
        ({**CLIP, "patch_size": 0}, "patch_dim is not possible"),
        ({**CLIP, "patch_size": [4, 4]}, "patch_size is of the wrong type"),
        ({**CLIP, "image_size": [1, 2, 3]}, "image_size is of the wrong type"),
        ({**CLIP, "image_size": "large"}, "image_size is of the wrong type"),
        ({**CLIP, "num_channels": 1}, "num_channels is not that of Megatron-Core's CLIPViTModel"),
        ({**VIT, "qkv_bias": False}, "qkv_bias is not that of family vit"),
        ({**T5, "relative_attention_num_buckets": 0}, "relative_attention_num_buckets is not possible"),
        ({**T5, "num_layers": 1 << 30}, "too many layers"),
        ({**T5, "d_kv": -4}, "kv_channels is not possible"),
        ({**BERT, "type_vocab_size": -1}, "num_tokentypes is not possible"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        made(config)
