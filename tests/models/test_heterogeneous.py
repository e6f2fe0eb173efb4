"""Llama-Nemotron: layers that lack attention or MLP, have one matrix in its place, or sizes of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples
from tests.models.remote_code import DECILM, LLAMA3_ROPE, block, decilm_shapes

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config import of_ranks
from anyckpt.config.layer_blocks import LayerBlock, decode, parse, render, width
from anyckpt.config.megatron_bridge import Facts, arguments_of, run_config_of
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.from_config import geometry_of
from anyckpt.models import Model
from anyckpt.tensor import LazyTensor, from_array

NEMO = "nemo.collections.llm.gpt.model.llama_nemotron"
ENCODED = "heterogeneous_layers_config_encoded_json"


def model_of(config: dict[str, Any]) -> Model:
    model = models.identify(Checkpoint("x", "x", {}, config=config, config_kind=models.config_kind(config)))
    assert model is not None
    return model


def geometry_of_args(arguments: dict[str, Any]) -> Geometry:
    return geometry_of(of_ranks.sizes(arguments, "megatron-args"))


def with_blocks(*blocks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**DECILM, "block_configs": list(blocks), "num_hidden_layers": len(blocks), **changes}


def tensors_of(config: dict[str, Any]) -> dict[str, LazyTensor]:
    random = np.random.default_rng(0)
    return {name: from_array(random.standard_normal(s).astype("<f4")) for name, s in decilm_shapes(config).items()}


# -- block_configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "multiplier", "expected"),
    [
        (8192, 5.25, 28672), (8192, 2.625, 14336), (8192, 3.28125, 17920), (8192, 1.3125, 7168),  # Super 49B
        (16384, 4.875, 53248), (16384, 1.95, 21504), (16384, 24.375, 266240),  # Ultra 253B
        (64, 5.25, 256),
    ],
)  # fmt: skip
def test_widths(hidden: int, multiplier: float, expected: int) -> None:
    assert width(multiplier, hidden) == expected
    (parsed,) = parse([block(8, multiplier)], 64, hidden)
    assert parsed == LayerBlock("whole", "whole", 8, expected, multiplier)
    assert render(parsed, 64, hidden)["ffn"]["ffn_mult"] == multiplier
    again = render(replace(parsed, ffn_mult=None), 64, hidden)["ffn"]
    assert "ffn_hidden_size" not in again
    assert width(again["ffn_mult"], hidden) == expected


def test_megatrons_own_words() -> None:
    text = json.dumps({
        "block_configs": [
            {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 48}},
            {"attention": {"no_op": True, "num_query_groups": None}, "mlp": {"replace_with_linear": True}},
            {
                "attention": {"n_heads_in_group": 8},
                "ffn": {"intermediate_size": 512, "gated": True, "hidden_act": "silu"},
            },
        ]
    })  # fmt: skip
    assert decode(text, 8, 64) == (
        LayerBlock("whole", "whole", 2, 48),
        LayerBlock("none", "linear"),
        LayerBlock("whole", "whole", 1, 512),
    )
    assert render(decode(text, 8, 64)[0], 8, 64)["ffn"] == {
        "ffn_mult": None, "no_op": False, "replace_with_linear": False, "ffn_hidden_size": 48,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "has no block_configs"),
        ([], "has no block_configs"),
        ({}, "has no block_configs"),
        ([3], r"block_configs\[0\] has no attention"),
        ([{"attention": {"n_heads_in_group": 4}}], r"block_configs\[0\] has no ffn"),
        ([{**block(4, 1.0), "ffn": [1]}], "has no ffn"),
        ([block(3, 1.0)], "n_heads_in_group is not possible"),
        ([block(0, 1.0)], "n_heads_in_group is not possible"),
        ([block(4, 0.0)], "ffn_mult is not possible"),
        ([block(4, float("nan"))], "ffn_mult is not possible"),
        ([block(4, 1e300)], "ffn_mult is not possible"),
        ([block(4, "2")], "ffn_mult is not possible"),  # type: ignore[arg-type]
        ([block(4, True)], "ffn_mult is not possible"),
        ([{**block(4), "ffn": {"ffn_hidden_size": -3}}], "ffn_mult is not possible"),
        ([{**block(4), "ffn": {"no_op": 1}}], "no_op is of the wrong type"),
        ([{**block(4), "ffn": {"no_op": True, "replace_with_linear": True}}], "both left out and replaced"),
        ([{**block(4, 1.0), "attention": {"n_heads_in_group": 4, "window_length": 8}}], "attention.window_length"),
        ([{**block(4, 1.0), "attention": {"n_heads_in_group": 4, "mamba": {"state_dim": 4}}}], "attention.mamba"),
        ([{**block(4, 1.0), "ffn": {"ffn_mult": 1.0, "moe": {}}}], "ffn.moe"),
        ([{**block(4, 1.0), "ffn": {"ffn_mult": 1.0, "gated": False, "hidden_act": "relu"}}], "ffn.hidden_act"),
    ],
)
def test_blocks_that_cannot_be(value: Any, problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        parse(value, 8, 64)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", '{"block_configs": null}'])
def test_text_that_is_no_such_configuration(text: str) -> None:
    with pytest.raises(MappingError, match=r"is not JSON|has no block_configs"):
        decode(text, 8, 64)


# -- configurations ------------------------------------------------------------------------------------------


def test_the_whole_model() -> None:
    config = model_of(DECILM).config
    assert (config.num_query_groups, config.ffn_hidden_size) == (2, 768), "the first attention's, the widest MLP's"
    assert config.heterogeneous_blocks is not None
    assert [(one.attention, one.mlp) for one in config.heterogeneous_blocks] == [
        ("whole", "whole"), ("none", "whole"), ("whole", "whole"), ("linear", "linear"), ("whole", "linear"),
        ("none", "none"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["hf", "megatron-args", "nemo2"])
def test_round_trip(kind: str) -> None:
    model = model_of(DECILM)
    again = model_of(models.render_config(model, kind))
    same = {"extra": {}, "dtype": None, "bos_token_id": None, "eos_token_id": None, "padded_vocab_size": None}
    assert replace(again.config, **same) == replace(model.config, **same)
    back = models.render_config(again, "hf")
    assert back["model_type"] == "nemotron-nas"
    assert back["architectures"] == ["DeciLMForCausalLM"]
    assert back["auto_map"] == DECILM["auto_map"]
    assert (back["intermediate_size"], back["num_key_value_heads"]) == (None, None)
    for one, other in zip(back["block_configs"], DECILM["block_configs"], strict=True):
        for part, keys in (("attention", ("n_heads_in_group",)), ("ffn", ("ffn_mult",))):
            for key in (*keys, "no_op", "replace_with_linear"):
                assert one[part][key] == other[part][key]


def test_what_megatron_lm_compares_its_arguments_with() -> None:
    """``validate_model_config_args_from_heterogeneous_config`` of Megatron-LM reads these keys."""
    arguments = models.render_config(model_of(with_blocks(block(4, 5.25), block(None, 2.625))), "megatron-args")
    encoded = json.loads(arguments[ENCODED])
    assert encoded["hidden_act"] == "silu"
    assert arguments["num_layers"] == encoded["num_hidden_layers"]
    assert arguments["hidden_size"] == encoded["hidden_size"]
    assert arguments["num_attention_heads"] == encoded["num_attention_heads"]
    assert arguments["untie_embeddings_and_output_weights"] is not encoded["tie_word_embeddings"]
    assert arguments["rotary_base"] == encoded["rope_theta"]
    assert arguments["rope_scaling_factor"] == encoded["rope_scaling"]["factor"]
    assert arguments["num_query_groups"] == 8 // encoded["block_configs"][0]["attention"]["n_heads_in_group"]
    usual = {
        "swiglu": True, "normalization": "RMSNorm", "group_query_attention": True, "position_embedding_type": "rope",
        "rotary_percent": 1.0, "use_rope_scaling": True, "use_rotary_position_embeddings": True,
    }  # fmt: skip
    assert {key: arguments[key] for key in usual} == usual
    assert arguments["heterogeneous_layers_config_path"], "its builder asks for one"


@pytest.mark.parametrize(
    ("config", "noted"),
    [
        (with_blocks(block(4, 5.25), block(None, 2.625)), False),
        (with_blocks(block(4, 5.25), block(2, 2.625)), True),
        (with_blocks(block(4, 5.25), block(4, 2.625), rope_scaling=None), True),
    ],
)
def test_what_megatron_lms_arguments_cannot_say(config: dict[str, Any], noted: bool) -> None:
    notes: list[str] = []
    models.render_config(model_of(config), "megatron-args", notes=notes)
    assert any("HeterogeneousTransformerConfig" in note for note in notes) is noted


def test_what_other_targets_refuse() -> None:
    odd = {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 48}}
    arguments = models.render_config(model_of(DECILM), "megatron-args")
    arguments |= {"num_layers": 1, ENCODED: json.dumps({"block_configs": [odd]})}
    with pytest.raises(MappingError, match=r"no word for the width of layer 0 .*multiple of 256"):
        models.render_config(model_of(arguments), "hf")
    with pytest.raises(MappingError, match="NeMo 1 has no models of family"):
        models.render_config(model_of(DECILM), "nemo1")
    with pytest.raises(MappingError, match="always scales rope"):
        models.render_config(model_of({**DECILM, "rope_scaling": None}), "nemo2")
    with pytest.raises(MappingError, match="has no heterogeneous_layers_config_encoded_json"):
        model_of({"_target_": f"{NEMO}.Llama33NemotronSuper49BConfig"})
    with pytest.raises(MappingError, match="heterogeneous_blocks is not of the model's length"):
        model_of({**DECILM, "num_hidden_layers": 5})
    with pytest.raises(MappingError, match="biases"):
        model_of({**DECILM, "mlp_bias": True, "attention_bias": True})
    stripped = {key: value for key, value in arguments.items() if key != ENCODED}
    bare = model_of({**stripped, "heterogeneous_layers_config_path": "x.json"})
    with pytest.raises(MappingError, match="does not say what each layer is"):
        bare.definition.expected(bare.config)


def test_homogeneous_models_are_llama() -> None:
    for name, layers in (("Llama31NemotronNano8BConfig", 32), ("Llama31Nemotron70BConfig", 80)):
        model = model_of({"_target_": f"{NEMO}.{name}"})
        assert (model.family, model.config.num_layers, model.config.kv_channels) == ("llama", layers, 128)
        assert model.config.rope_scaling is not None


def test_megatron_bridge() -> None:
    arguments = models.render_config(model_of(DECILM), "megatron-args")
    run_config = run_config_of(arguments, 128, Facts("bfloat16", False, False))
    assert run_config["model"]["_target_"].endswith(".LlamaNemotronHeterogeneousProvider")
    again = model_of(arguments_of(run_config, "run_config.yaml", []))
    assert again.family == "llama-nemotron"
    assert again.config.heterogeneous_blocks == model_of(DECILM).config.heterogeneous_blocks
    assert again.config.rope_scaling == LLAMA3_ROPE
    with pytest.raises(MappingError, match="always scale rope"):
        run_config_of({**arguments, "use_rope_scaling": False}, 128, Facts("bfloat16", False, False))


# -- names and ranks -----------------------------------------------------------------------------------------


def test_layers_that_are_alike_are_numbered_all_the_same() -> None:
    """Megatron-Core numbers the layers of a heterogeneous model in a distributed checkpoint."""
    config = with_blocks(block(4, 5.25), block(4, 5.25))
    source = Checkpoint("x", "hf", tensors_of(config), dialect="hf", config=config, config_kind="hf")
    model = models.identify(source)
    assert model is not None
    named = models.from_hub(models.to_hub(source, model), "megatron-core").tensors
    assert "decoder.layers.1.mlp.linear_fc1.weight" in named
    assert not any(name.startswith("decoder.layers.mlp") for name in named)
    back = models.to_hub(with_weights(source, named), model)
    assert facts(models.from_hub(back, "hf").tensors) == facts(source.tensors)


def test_norms_of_the_local_implementation() -> None:
    source, model = samples()["llama-nemotron"].open()
    hub = models.to_hub(source, model)
    names = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.", "self_attention.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.", "mlp.layer_norm_": "pre_mlp_layernorm.",
    }  # fmt: skip
    local = {}
    for name, tensor in hub.tensors.items():
        for fused, own in names.items():
            name = name.replace(fused, own)
        local[name] = tensor
    assert "decoder.layers.3.input_layernorm.weight" in local
    assert facts(models.to_hub(with_weights(source, local), model).tensors) == facts(hub.tensors)


@pytest.mark.parametrize(
    "parallelism",
    [
        Parallelism(tensor_parallel=2),
        Parallelism(tensor_parallel=2, pipeline_parallel=3),
        Parallelism(pipeline_parallel=6),
        Parallelism(tensor_parallel=4, pipeline_parallel=3, virtual_pipeline=2),
    ],
)
def test_ranks(parallelism: Parallelism) -> None:
    source, model = samples()["llama-nemotron"].open()
    hub = models.to_hub(source, model).tensors
    geometry = geometry_of_args(models.render_config(model, "megatron-args"))
    shards = cut(hub, parallelism, geometry)
    ways = parallelism.tensor_parallel
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name.endswith(("self_attention.weight", "mlp.weight")):
                assert tensor.shape == (64 // ways, 64), "along the output, which is gathered"
    joined = join(shards, parallelism, geometry, verify_replicas=True)
    assert facts(joined.tensors) == facts(hub)
    assert joined.warnings == []


def test_ranks_go_by_each_layers_own_sizes() -> None:
    source, model = samples()["llama-nemotron"].open()
    hub = models.to_hub(source, model).tensors
    arguments = models.render_config(model, "megatron-args")
    swapped = json.loads(arguments[ENCODED])
    blocks = swapped["block_configs"]
    blocks[0], blocks[2] = blocks[2], blocks[0]
    wrong = geometry_of_args({**arguments, ENCODED: json.dumps(swapped)})
    with pytest.raises(MappingError, match=r"disagree on this tensor.*128 rows by the configuration.*96 rows"):
        cut(hub, Parallelism(tensor_parallel=2), wrong)
    shards = cut(hub, Parallelism(tensor_parallel=2), geometry_of_args(arguments))
    with pytest.raises(MappingError, match=r"disagree on this tensor.*128 rows by the configuration.*96 rows"):
        join(shards, Parallelism(tensor_parallel=2), wrong)
    blocks[5] = render(LayerBlock("none", "linear"), 8, 64)
    lost = geometry_of_args({**arguments, ENCODED: json.dumps({"block_configs": blocks})})
    with pytest.raises(MappingError, match=r"disagree on the decoder layers .*0 to 5 .*0 to 4"):
        cut(hub, Parallelism(), lost)


def test_query_groups_of_every_layer_fit_the_ranks() -> None:
    arguments = models.render_config(model_of(with_blocks(block(4, 5.25), block(8, 2.625))), "megatron-args")
    config = with_blocks(block(4, 5.25), block(8, 2.625), num_attention_heads=24, hidden_size=96)
    uneven = geometry_of_args(models.render_config(model_of(config), "megatron-args"))
    with pytest.raises(MappingError, match=r"query groups cannot be spread .*3 query groups"):
        cut({}, Parallelism(tensor_parallel=2), uneven)
    even = geometry_of_args(arguments)
    assert even.query_groups == {1, 2}
    with pytest.raises((MappingError, UsageError), match="disagree on the decoder layers"):
        cut({}, Parallelism(tensor_parallel=2), even)


def test_rope_of_the_sample_is_llama_3s() -> None:
    assert model_of(DECILM).config.rope_scaling == LLAMA3_ROPE
