"""T5 v1.1 and original T5: scales, ties, copies, activations, and NeMo 1's sections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.encoder_cases import T5, made, reidentified, renamed
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config import of_ranks
from anyckpt.errors import MappingError
from anyckpt.tensor import from_array


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
        of_ranks.sizes(config, "nemo1")


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
