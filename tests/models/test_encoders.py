"""BERT, Megatron-BERT, T5, CLIP's vision transformer and ViT: stored spellings, heads, configurations, layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import Case, facts, open_case, with_weights
from tests.models.proofs import Tiny
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.layout.from_nemo_config import geometry_from_nemo
from anyckpt.models import Model, dialects
from anyckpt.models.config import ModelConfig
from anyckpt.operations.naming import rename_for
from anyckpt.operations.recut import LayoutRequest
from anyckpt.tensor import LazyTensor, from_array

FIXTURES = ("megatron_bert", "t5_v1_1", "clip_vision", "vit")
BEHIND = {
    "megatron_bert": set(),
    "t5_v1_1": {"lm_head.output_layer.bias"},
    "clip_vision": {"post_layernorm.weight", "post_layernorm.bias"},
    "vit": {"layernorm.weight", "layernorm.bias"},
}
"""What the hub has besides the fixture's tensors of Megatron-Core: zeros that it adds, norms that it leaves out."""
TAGS = {"col0": {"qkv", "column", "gate-up"}, "row1": {"row"}, "gateup0": {"gate-up"}, "vocab0": {"vocabulary"}}
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 60, "max_position_embeddings": 16,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
CLIP, VIT = {"model_type": "clip_vision_model", **IMAGES}, {"model_type": "vit", **IMAGES}

case = cache(open_case)


def made(config: Mapping[str, Any]) -> tuple[Checkpoint, Model]:
    """A random model of such a configuration."""
    return Tiny(name="tiny", config=config).open()


def reidentified(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], dialect: str | None = "hf") -> Model:
    model = models.identify(with_weights(checkpoint, tensors, dialect))
    assert model is not None
    return model


def renamed(tensors: Mapping[str, LazyTensor], change: Callable[[str], str]) -> dict[str, LazyTensor]:
    return {change(name): tensor for name, tensor in tensors.items()}


# -- fixtures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_the_hub_is_what_gave_equal_outputs(name: str) -> None:
    found, expected = facts(case(name).hub().tensors), facts(case(name).megatron)
    assert {key: found[key] for key in expected} == expected
    assert found.keys() - expected.keys() == BEHIND[name]


@pytest.mark.parametrize("name", FIXTURES)
def test_partitions_are_those_of_the_fixture(name: str) -> None:
    rules = {rule.hub: rule.partition for rule in case(name).model.definition.rules}
    for rule in case(name).meta["rules"]:
        hub = (
            rule["mcore"].replace("output_layer.weight", "lm_head.output_layer.weight")
            if name == "t5_v1_1"
            else rule["mcore"]
        )
        if hub in rules:
            assert rules[hub] in TAGS.get(rule["tp"], {"replicated"}), hub
    assert all(hub in rules for hub in _patterns(case(name)))


def _patterns(fixture: Case) -> set[str]:
    return {re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in fixture.megatron}


# -- BERT ----------------------------------------------------------------------------------------------------


def test_heads_follow_from_class_and_tensors() -> None:
    """Weights of pre-training under the name of a masked language model, as the first BERT is stored."""
    checkpoint, model = made({**BERT, "architectures": ["BertForPreTraining"]})
    masked = replace(checkpoint, config={**checkpoint.config, "architectures": ["BertForMaskedLM"]})
    config = reidentified(masked, checkpoint.tensors).config
    assert (config.add_pooler, config.add_lm_head, config.bert_binary_head) == (True, True, True)
    assert models.render_config(replace(model, config=config), "hf")["architectures"] == ["BertForPreTraining"]
    bare = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("bert.e")}
    config = reidentified(replace(checkpoint, config=BERT), renamed(bare, lambda name: name[5:])).config
    assert (config.add_pooler, config.add_lm_head, config.bert_binary_head) == (False, False, False)


@pytest.mark.parametrize("change", ["gamma", "positions", "decoder", "wrapped"])
def test_old_spellings_of_bert(change: str) -> None:
    checkpoint, model = made({**BERT, "architectures": ["BertForPreTraining"]})
    old = dict(checkpoint.tensors)
    ignored = {}
    if change == "gamma":
        old = renamed(old, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
        old = renamed(old, lambda name: name.replace("LayerNorm.bias", "LayerNorm.beta"))
    elif change == "positions":
        old["bert.embeddings.position_ids"] = from_array(np.arange(16)[None])
        ignored = {"bert.embeddings.position_ids": "numbers of positions, which follow from the configuration"}
    elif change == "decoder":
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
        old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"]
        ignored = {
            "cls.predictions.decoder.weight": "tied to bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "the same tensor as cls.predictions.bias",
        }
    else:
        old = renamed(old, lambda name: f"module.{name}")
    hub = models.to_hub(with_weights(checkpoint, old, "hf"), reidentified(checkpoint, old))
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    assert hub.ignored == ignored


def test_a_copy_alone_and_a_copy_that_differs() -> None:
    checkpoint, model = made({**BERT, "architectures": ["BertForMaskedLM"]})
    alone = renamed(checkpoint.tensors, lambda name: name.replace("predictions.bias", "predictions.decoder.bias"))
    hub = models.to_hub(with_weights(checkpoint, alone, "hf"), model)
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    other = {**checkpoint.tensors, "cls.predictions.decoder.bias": from_array(np.zeros(60, "<f4"))}
    with pytest.raises(MappingError, match="differs from cls.predictions.bias") as caught:
        models.to_hub(with_weights(checkpoint, other, "hf"), model)
    assert "cls.predictions.decoder.bias" in str(caught.value)


def test_an_untied_bert() -> None:
    config = {**BERT, "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}
    checkpoint, model = made(config)
    assert "cls.predictions.decoder.weight" in checkpoint.tensors
    assert "output_layer.weight" in models.to_hub(checkpoint, model).tensors
    assert models.render_config(model, "megatron-args")["untie_embeddings_and_output_weights"]


def test_an_output_bias_that_nothing_uses() -> None:
    """NeMo 2 builds it for an encoder alone; NVIDIA's converter to NeMo 1 takes it out."""
    checkpoint, model = made({**BERT, "architectures": ["BertModel"]})
    there = models.from_hub(models.to_hub(checkpoint, model), "nemo2").tensors
    assert not there["module.output_layer.bias"].numpy().any()
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    del named["model.output_layer.bias"]
    back = models.to_hub(with_weights(checkpoint, named), model)
    assert facts(models.from_hub(back, "hf").tensors) == facts(checkpoint.tensors)
    trained = {**there, "module.output_layer.bias": from_array(np.ones(64, "<f4"))}
    with pytest.raises(MappingError, match="is not zero"):
        models.from_hub(models.to_hub(with_weights(checkpoint, trained), model), "hf")


@pytest.mark.parametrize(
    ("key", "value"), [("is_decoder", True), ("add_cross_attention", True), ("position_embedding_type", "relative_key")]
)
def test_berts_that_are_no_encoders(key: str, value: Any) -> None:
    with pytest.raises(MappingError, match=f"{key} is not that of the family"):
        made({**BERT, key: value})


def test_what_frameworks_build_besides_a_bert() -> None:
    def said(config: Mapping[str, Any], kind: str) -> str:
        notes: list[str] = []
        models.render_config(made(config)[1], kind, notes=notes)
        return " ".join(notes)

    whole = {**BERT, "architectures": ["BertForPreTraining"]}
    assert "norms elsewhere" in said(whole, "megatron-args")
    assert "final norm" in said(whole, "nemo1")
    assert "output_layer.bias" in said(whole, "nemo2")
    assert said({**BERT, "architectures": ["BertModel"]}, "nemo2") == ""
    assert "has no lm_head" in said({**BERT, "architectures": ["BertModel"]}, "nemo1")
    assert "bert_binary_head: set it to true" in said({**BERT, "architectures": ["BertForMaskedLM"]}, "nemo1")
    assert (
        said({**whole, "model_type": "megatron-bert", "architectures": ["MegatronBertForPreTraining"]}, "nemo1") == ""
    )


LEGACY = {
    "encoder.layers": "language_model.encoder.layers", "encoder.initial": "language_model.encoder.initial",
    "encoder.final": "language_model.encoder.final", "embedding.": "language_model.embedding.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "self_attention.linear_qkv": "self_attention.query_key_value", "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "post_att_layernorm": "input_layernorm",
    "post_mlp_layernorm": "post_attention_layernorm", "pooler": "language_model.pooler",
    "output_layer.bias": "lm_head.bias", "lm_head.layer_norm": "lm_head.layernorm",
}  # fmt: skip
"""Megatron-Core's names in NVIDIA's ``convert_bert_hf_to_nemo.py`` -> those it writes without ``--mcore``."""


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertModel", "MegatronBertForPreTraining"])
def test_names_of_nemo_1_before_megatron_core(architecture: str, prefix: str) -> None:
    family = {"model_type": "megatron-bert"} if architecture.startswith("Megatron") else {}
    checkpoint, model = made({**BERT, **family, "architectures": [architecture]})
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    if architecture == "BertModel":
        del named["output_layer.bias"]

    def old(name: str) -> str:
        for new, before in LEGACY.items():
            name = name.replace(new, before, 1) if before not in name else name
        return prefix + name

    config = {**models.render_config(model, "nemo1"), "mcore_bert": False}
    del config["hf_model_type"], config["num_tokentypes"]
    stored = replace(
        checkpoint, format="nemo", tensors=renamed(named, old), dialect=None, config=config, config_kind="nemo1"
    )
    assert any(".input_layernorm." in name for name in stored.tensors)
    hf = rename_for(stored, registry.by_name("hf"), registry.WriteOptions()).checkpoint
    assert facts(hf.tensors) == facts(checkpoint.tensors)
    assert hf.config["architectures"] == [architecture]


# -- T5 ------------------------------------------------------------------------------------------------------


def test_stored_copies_of_t5() -> None:
    checkpoint, model = made({**T5, "tie_word_embeddings": True})
    shared, bias = (
        checkpoint.tensors["shared.weight"],
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )
    copies = {f"{name}.weight": shared for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
    old = {**checkpoint.tensors, **copies, bias: from_array(np.ones((32, 4), "<f4"))}
    hub = models.to_hub(with_weights(checkpoint, old, "hf"), reidentified(checkpoint, old))
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    assert hub.ignored.keys() == {*copies, bias}


@pytest.mark.parametrize(
    ("said", "tied", "scaled"),
    [
        ({}, True, True),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
        ({"tie_word_embeddings": False}, False, False),
    ],
)
def test_what_a_tie_means_in_t5(said: dict[str, bool], tied: bool, scaled: bool) -> None:
    """In transformers 4 that logits are scaled; in 5 nothing."""
    config = made({**T5, **said})[1].config
    assert (config.share_embeddings_and_output_weights, config.scale_decoder_outputs) == (tied, scaled)


def test_the_scale_of_original_t5_is_in_the_last_norm() -> None:
    checkpoint, model = made({**T5, "d_model": 64})
    hub = models.to_hub(checkpoint, model)
    norm = checkpoint.tensors["decoder.final_layer_norm.weight"].numpy()
    np.testing.assert_array_equal(hub.tensors["decoder.final_layernorm.weight"].numpy(), norm / 8)
    assert not hub.notes
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)
    rounded = models.to_hub(*made(T5))
    assert rounded.notes == [
        "decoder.final_layernorm.weight: Megatron's values are Hugging Face's times 0.176777, rounded: not bit for bit "
        "the same either way"
    ]


def test_queries_are_scaled_where_that_is_exact() -> None:
    checkpoint, model = made(T5)
    name = "decoder.block.1.layer.1.EncDecAttention.q.weight"
    found = models.to_hub(checkpoint, model).tensors["decoder.layers.1.cross_attention.linear_q.weight"].numpy()
    np.testing.assert_array_equal(found, 4 * checkpoint.tensors[name].numpy())
    assert models.render_config(model, "nemo2")["config"]["softmax_scale"] is None
    checkpoint, model = made({**T5, "d_kv": 8})
    found = models.to_hub(checkpoint, model).tensors["decoder.layers.1.cross_attention.linear_q.weight"].numpy()
    np.testing.assert_array_equal(found, checkpoint.tensors[name].numpy())
    for kind in ("nemo1", "megatron-args"):
        assert models.render_config(model, kind)["softmax_scale"] == 1.0
    assert models.render_config(model, "nemo2")["config"]["softmax_scale"] == 1.0


def test_a_t5_of_nvidias_importer() -> None:
    """Its queries are as transformers', and its configuration says softmax_scale 1."""
    checkpoint, model = made({**T5, "scale_decoder_outputs": False})
    rendered = models.render_config(model, "nemo2")
    rendered["config"]["softmax_scale"] = 1.0
    plain = replace(model, config=replace(model.config, query_pre_attn_scalar=1.0))
    named = models.from_hub(models.to_hub(checkpoint, plain), "nemo2").tensors
    between = replace(with_weights(checkpoint, named), config=rendered, config_kind="nemo2")
    again = models.identify(between)
    assert again is not None
    assert again.config.query_pre_attn_scalar == 1.0
    assert facts(models.from_hub(models.to_hub(between, again), "hf").tensors) == facts(checkpoint.tensors)


@pytest.mark.parametrize("scale", [0, -1.0, 1e-300, "x"])
def test_factors_that_attention_cannot_have(scale: Any) -> None:
    checkpoint, model = made({**T5, "d_kv": 8})
    rendered = models.render_config(model, "nemo2")
    rendered["config"]["softmax_scale"] = scale
    arguments = {**models.render_config(model, "megatron-args"), "softmax_scale": scale, "query_pre_attn_scalar": None}
    for config, kind in ((rendered, "nemo2"), (arguments, "megatron-args")):
        with pytest.raises(MappingError, match="softmax_scale is (not possible|of the wrong type)"):
            models.identify(replace(checkpoint, tensors={}, config=config, config_kind=kind))


@pytest.mark.parametrize("stack", [{"num_layers": "two"}, {"num_layers": [2]}, {"num_attention_heads": {}}])
def test_impossible_sections_of_nemo_1(stack: dict[str, Any], tmp_path: Path) -> None:
    model = made(T5)[1]
    config = models.render_config(model, "nemo1")
    config["encoder"] = {**config["encoder"], **stack}
    with pytest.raises(MappingError, match="of the wrong type"):
        models.identify(Checkpoint("x", "nemo", {}, config=config, config_kind="nemo1"))
    with pytest.raises(MappingError, match="of the wrong type"):
        geometry_from_nemo(config)


def test_an_output_layer_that_is_registered_twice() -> None:
    checkpoint, model = made({**T5, "tie_word_embeddings": False})
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    head = named["lm_head.output_layer.weight"]
    twice = models.to_hub(with_weights(checkpoint, {**named, "output_layer.weight": head}), model)
    assert twice.ignored == {"output_layer.weight": "the same tensor as lm_head.output_layer.weight"}
    once = renamed(named, lambda name: name.removeprefix("lm_head."))
    assert facts(models.to_hub(with_weights(checkpoint, once), model).tensors) == facts(twice.tensors)
    other = from_array(np.roll(head.numpy(), 1))
    with pytest.raises(MappingError, match="differs from lm_head.output_layer.weight"):
        models.to_hub(with_weights(checkpoint, {**named, "output_layer.weight": other}), model)


@pytest.mark.parametrize(
    ("spelled", "activation", "gated"),
    [
        ("relu", "relu", False), ("gelu", "gelu", False), ("gelu_new", "gelu_tanh", False), ("silu", "silu", False),
        ("gated-gelu", "gelu_tanh", True), ("gated-silu", "silu", True), ("gated-relu", "relu", True),
        ("gated-gelu_python", "gelu", True),
    ],
)  # fmt: skip
def test_activations_of_t5(spelled: str, activation: str, gated: bool) -> None:
    checkpoint, model = made({**T5, "feed_forward_proj": spelled})
    assert (model.config.activation, model.config.gated_linear_unit) == (activation, gated)
    assert models.render_config(model, "hf")["feed_forward_proj"] == spelled
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    rendered = models.render_config(model, "megatron-args")
    again = models.identify(replace(with_weights(checkpoint, named), config=rendered, config_kind="megatron-args"))
    assert again is not None
    assert (again.config.activation, again.config.gated_linear_unit) == (activation, gated)


def test_t5s_that_cannot_be() -> None:
    with pytest.raises(MappingError, match="feed_forward_proj is unknown"):
        made({**T5, "feed_forward_proj": "gated-mish"})
    model = made(T5)[1]
    odd = replace(model, config=replace(model.config, activation="squared_relu"))
    with pytest.raises(MappingError, match="T5ForConditionalGeneration has no such layers"):
        models.render_config(odd, "hf")


def test_what_frameworks_cannot_say_of_a_t5() -> None:
    def said(config: Mapping[str, Any], kind: str) -> str:
        notes: list[str] = []
        models.render_config(made(config)[1], kind, notes=notes)
        return " ".join(notes)

    assert "as many layers as its encoder" in said(T5, "megatron-args")
    assert "as many layers" not in said({**T5, "num_decoder_layers": 2}, "megatron-args")
    assert "32 buckets" in said({**T5, "relative_attention_num_buckets": 16}, "nemo2")
    assert "stays part of the decoder's last norm" in said(T5, "nemo2")
    assert "transformers 4 takes" in said({**T5, "scale_decoder_outputs": False}, "hf")


@pytest.mark.parametrize("target", ["megatron-core", "nemo2"])
def test_tokens_that_t5_begins_with(target: str, tmp_path: Path) -> None:
    """Its decoder begins with the padding token; NeMo 2 leaves tokens to the tokenizer, of which there is none."""
    anyckpt.convert(fixture_path("families/t5_v1_1/hf"), tmp_path / "there", to=target)
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 0
    assert generation.get("eos_token_id") == (None if target == "nemo2" else 1)


def test_sections_of_nemo_1() -> None:
    """``megatron_t5_config.yaml`` as NVIDIA writes it, with nothing of the stacks at the top level."""
    checkpoint, model = made({**T5, "scale_decoder_outputs": False})
    rendered = models.render_config(model, "nemo1")
    assert (rendered["encoder"]["num_layers"], rendered["decoder"]["num_layers"]) == (2, 3)
    stacks = {**rendered["encoder"], "encoder_num_layers": 0, "decoder_num_layers": 0, "hf_model_type": 0}
    nested = {key: value for key, value in rendered.items() if key not in stacks}
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    assert all(name.startswith("enc_dec_model.") for name in named)
    for config in (nested, {"model": nested}, {"cfg": nested}):
        between = replace(with_weights(checkpoint, named), config=config, config_kind="nemo1")
        again = models.identify(between)
        assert again is not None
        assert again.family == "t5"
        assert (again.config.encoder_num_layers, again.config.num_layers) == (2, 3)
        assert facts(models.from_hub(models.to_hub(between, again), "hf").tensors) == facts(checkpoint.tensors)


# -- vision --------------------------------------------------------------------------------------------------


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
        assert dialects.detect(new) == "hf"


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
        ({**VIT, "qkv_bias": False}, "qkv_bias is not that of Megatron-Core's layers"),
        ({**T5, "relative_attention_num_buckets": 0}, "relative_attention_num_buckets is not possible"),
        ({**T5, "num_layers": 1 << 30}, "too many layers"),
        ({**T5, "d_kv": -4}, "kv_channels is not possible"),
        ({**BERT, "type_vocab_size": -1}, "num_tokentypes is not possible"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        made(config)


# -- which family it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("dialect", ["hub", "megatron-core", "nemo-flat"])
def test_the_family_follows_from_parts(name: str, dialect: str) -> None:
    """Megatron's arguments do not name it, and say ``bert_binary_head``, ``img_h`` and so on of a GPT, too."""
    fixture = case(name)
    rendered = models.render_config(fixture.model, "megatron-args")
    del rendered["hf_model_type"]
    named = models.from_hub(fixture.hub(), dialect).tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    assert found.family == fixture.model.family


def test_a_gpt_with_the_arguments_of_others() -> None:
    fixture = open_case("gpt2")
    rendered = {
        **models.render_config(fixture.model, "megatron-args"), "bert_binary_head": True, "img_h": 224, "img_w": 224,
        "patch_dim": 16, "num_classes": 1000, "encoder_num_layers": fixture.model.config.num_layers,
        "decoder_num_layers": None, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    }  # fmt: skip
    del rendered["hf_model_type"]
    named = models.from_hub(fixture.hub(), "hub").tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    assert found.family == "gpt2"
    blank = ModelConfig("", 1, 1, 1, 1, 1, 1)
    assert all(getattr(found.config, key) == getattr(blank, key) for key in ("img_h", "num_classes", "add_pooler"))
    bert = case("megatron_bert")
    other = replace(
        between, tensors=models.from_hub(bert.hub(), "hub").tensors, config={**rendered, "openai_gelu": False}
    )
    found = models.identify(other)
    assert found is not None
    assert found.family == "megatron-bert", "by the stack that is there"


def test_megatron_lms_own_bert() -> None:
    """Its arguments say nothing of a pooler or of token types: the tensors do."""
    fixture = case("megatron_bert")
    rendered = models.render_config(fixture.model, "megatron-args")
    for key in ("num_tokentypes", "add_pooler", "add_lm_head", "hf_model_type"):
        del rendered[key]
    named = models.from_hub(fixture.hub(), "hub").tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    back = models.from_hub(models.to_hub(between, found), "hf").tensors
    assert facts(back) == facts(fixture.checkpoint.tensors)


def test_a_t5_with_positions_of_its_own_is_of_no_family(tmp_path: Path) -> None:
    """Megatron's own T5 learns positions, which transformers' has not: names are translated all the same."""
    checkpoint, model = made({**T5, "scale_decoder_outputs": False})
    rendered = models.render_config(model, "nemo2")
    rendered["config"]["position_embedding_type"] = "learned_absolute"
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo2").tensors
    named["module.embedding.position_embeddings.weight"] = from_array(np.zeros((512, 32), "<f4"))
    between = replace(with_weights(checkpoint, named), config=rendered, config_kind="nemo2")
    assert models.identify(between) is None
    renamed_all = dialects.rename(named, "nemo2", "megatron-core")[0]
    assert "embedding.position_embeddings.weight" in renamed_all


@pytest.mark.parametrize("name", FIXTURES)
def test_stored_names_are_known_without_a_configuration(name: str) -> None:
    assert dialects.detect(case(name).checkpoint.tensors) == "hf"
    for dialect in ("hub", "megatron-core", "nemo-flat", "nemo-sharded", "nemo2"):
        assert dialects.detect(models.from_hub(case(name).hub(), dialect).tensors) == dialect


def test_stacks_of_different_lengths() -> None:
    checkpoint, model = made(T5)
    named = models.from_hub(models.to_hub(checkpoint, model), "megatron-core").tensors
    assert named["encoder.layers.mlp.linear_fc2.weight"].shape == (2, 32, 48)
    assert named["decoder.layers.mlp.linear_fc2.weight"].shape == (3, 32, 48)


# -- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"), [("megatron_bert", "nemo"), ("t5_v1_1", "nemo"), ("t5_v1_1", "megatron-lm")]
)
def test_files_of_ranks_there_and_back(name: str, target: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{name}/hf")
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    anyckpt.convert(source, there, to=target, layout=LayoutRequest(tensor_parallel=2))
    stored = registry.read(str(there))
    if target == "nemo":
        prefix = "enc_dec_model" if name == "t5_v1_1" else "model"
        assert all(key.split(".")[1] == prefix for key in stored.tensors)
        assert stored.config["target"].rpartition(".")[2] in ("MegatronBertModel", "MegatronT5Model")
    else:
        assert any(key.endswith("model.output_layer.bias") for key in stored.tensors), "registered twice"
    anyckpt.convert(there, tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(source).tensors)


def test_a_pipeline(tmp_path: Path) -> None:
    """One stack is dealt out; Megatron-LM has no pipeline for a T5."""
    bert, t5 = (fixture_path(f"families/{name}/hf") for name in ("megatron_bert", "t5_v1_1"))
    pipeline = LayoutRequest(pipeline_parallel=2)
    anyckpt.convert(bert, tmp_path / "there", to="megatron-lm", layout=pipeline)
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(bert).tensors)
    with pytest.raises(UsageError, match=r"an encoder-decoder is divided at a pipeline split rank.*choose --pp 1"):
        anyckpt.convert(t5, tmp_path / "t5", to="megatron-lm", layout=pipeline)


@pytest.mark.parametrize(("name", "target"), [("clip_vision", "nemo"), ("vit", "nemo"), ("vit", "nemo2")])
def test_frameworks_without_such_models(name: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="has no models of family"):
        anyckpt.convert(fixture_path(f"families/{name}/hf"), tmp_path / "there", to=target)


@pytest.mark.parametrize("name", FIXTURES)
def test_config_json_comes_back(name: str) -> None:
    """Every key that says something about the model, through each framework's configuration."""
    fixture = case(name)
    dropped = {"initializer_factor", "classifier_dropout", "transformers_version", "use_cache", "dtype", "torch_dtype"}
    dropped |= {"encoder_stride", "pooler_act", "pooler_output_size", "projection_dim", "bos_token_id", "eos_token_id"}
    for dialect, kind in (("hub", "megatron-args"), ("nemo-flat", "nemo1"), ("nemo2", "nemo2")):
        try:
            rendered = json.loads(json.dumps(models.render_config(fixture.model, kind)))
        except MappingError:
            continue
        named = models.from_hub(fixture.hub(), dialect).tensors
        between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind=kind)
        again = models.identify(between)
        assert again is not None
        back = models.render_config(again, "hf")
        kept = {key: value for key, value in fixture.checkpoint.config.items() if key not in dropped}
        if kind == "nemo2":
            kept.pop("pad_token_id", None)  # of the tokenizer
        assert {key: back.get(key) for key in kept} == kept, kind
