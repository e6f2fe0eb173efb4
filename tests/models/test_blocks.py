"""Configurations of models with experts, latent attention and mixers: what real ones say, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.cases import open_case, with_weights
from tests.models.sparse_cases import FAMILIES, UNSAYABLE

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.spellings import Variant
from anyckpt.errors import AnyckptError, MappingError
from anyckpt.models import Model
from anyckpt.models.language.variants import family_names
from anyckpt.operations.steps.casts import KEEP_IN_FP32, cast_weights
from anyckpt.tensor import LazyTensor, from_array


def model_of(config: dict[str, Any], kind: str | None = None) -> Model:
    found = kind or models.config_kind(config)
    model = models.identify(Checkpoint("x", "x", {}, config=config, config_kind=found))
    assert model is not None
    return model


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 61,
    "first_k_dense_replace": 3, "n_shared_experts": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "moe_layer_freq": 1, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
"""As released, but for what is the class's default, and without quantization."""


def test_deepseek_v3_as_released() -> None:
    model = model_of(DEEPSEEK_V3)
    arguments = models.render_config(model, "megatron-args")
    expected = {
        "num_experts": 256, "moe_router_topk": 8, "moe_ffn_hidden_size": 2048, "moe_router_score_function": "sigmoid",
        "moe_layer_freq": [0] * 3 + [1] * 58, "moe_shared_expert_intermediate_size": 2048, "q_lora_rank": 1536,
        "moe_router_num_groups": 8, "moe_router_group_topk": 4, "rope_type": "yarn", "rotary_scaling_factor": 40,
        "mscale_all_dim": 1, "original_max_position_embeddings": 4096, "kv_channels": 128, "qk_layernorm": True,
        "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5,
    }  # fmt: skip
    assert {key: arguments[key] for key in expected} == expected
    nemo = models.render_config(model, "nemo2")["config"]
    assert nemo["_target_"].endswith("deepseek.DeepSeekV3Config")
    assert {key: nemo[key] for key in expected if key != "num_experts"}.items() <= expected.items()
    assert len(model.definition.expected(model.config)) == 3 + 3 * 11 + 58 * (13 + 2 * 256), "tensors of the hub"
    notes: list[str] = []
    models.render_config(model, "megatron-args", notes=notes)
    assert not [note for note in notes if "groups of experts" in note], "8 is twice 4"
    other = replace(model, config=replace(model.config, moe_router_group_topk=2))
    models.render_config(other, "megatron-args", notes=notes)
    assert [note for note in notes if "by the best 4 of each, transformers by the best 2" in note]


def test_plain_rope_is_not_scaled_by_default() -> None:
    """Megatron-Core scales latent attention by YaRN unless it is told otherwise."""
    model = open_case("deepseek_v3").model
    arguments = models.render_config(model, "megatron-args")
    assert (arguments["rope_type"], arguments["rotary_scaling_factor"]) == ("rope", 1.0)
    del arguments["rope_type"]
    scaling = model_of(arguments, "megatron-args").config.rope_scaling
    assert scaling is not None
    assert scaling["rope_type"] == "yarn"


def test_gpt_oss_as_released() -> None:
    model = model_of({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]})
    config = model.config
    assert (config.window_size, config.window_attn_skip_freq) == ((127, 0), 2), "a window of 128 tokens"
    assert (config.num_moe_experts, config.activation_func_clamp_value) == (128, 7.0)
    arguments = models.render_config(model, "megatron-args")
    assert arguments["position_embedding_type"] == "yarn"
    assert arguments["yarn_rotary_scaling_factor"] == 32
    assert arguments["yarn_correction_range_round_to_int"] is False
    assert arguments["softmax_type"] == "learnable"
    nemo = models.render_config(model, "nemo2")["config"]
    assert (nemo["rotary_scaling_factor"], "yarn_rotary_scaling_factor" in nemo) == (32, False)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("mixtral.MixtralConfig8x7B", 32), ("mixtral.MixtralConfig8x22B", 56), ("qwen3.Qwen3Config30B_A3B", 48),
        ("deepseek.DeepSeekV3Config", 61), ("deepseek.DeepSeekV2Config", 60), ("deepseek.DeepSeekV2LiteConfig", 27),
        ("gpt_oss.GPTOSSConfig20B", 24), ("ssm.NemotronHConfig8B", 52),
    ],
)  # fmt: skip
def test_nemo_2_classes_have_defaults(target: str, layers: int) -> None:
    """io.json holds only what was passed; the class is the rest."""
    model = model_of({"_target_": f"nemo.collections.llm.gpt.model.{target}"})
    assert model.config.num_layers == layers
    assert models.render_config(replace(model, config=replace(model.config, vocab_size=100)), "hf")["vocab_size"] == 100
    assert model.definition.nemo2 is not None
    assert model.definition.nemo2.module.endswith(target.partition(".")[0])


def test_nemos_mixtral_is_told() -> None:
    config = {"_target_": "nemo.collections.llm.gpt.model.mixtral.MixtralConfig8x7B", "vocab_size": 32000}
    model = model_of({**config, "moe_router_pre_softmax": True})  # as up to NeMo 2.0
    notes: list[str] = []
    models.render_config(model, "hf", notes=notes)
    assert [note for note in notes if "moe_router_pre_softmax" in note]


def test_layers_without_experts_among_others() -> None:
    case = open_case("qwen3_moe")
    config = {**case.checkpoint.config, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = model_of(config, "hf")
    assert model.config.moe_layer_freq == (0, 1, 0, 0, 0, 1)
    rendered = models.render_config(model, "hf")
    assert (rendered["decoder_sparse_step"], rendered["mlp_only_layers"]) == (1, [0, 2, 3, 4])
    assert model_of(rendered, "hf").config.moe_layer_freq == model.config.moe_layer_freq
    names = {item.hub for item in model.definition.expected(model.config)}
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names
    deepseek = open_case("deepseek_v3").model
    scattered = replace(deepseek, config=replace(deepseek.config, num_layers=3, moe_layer_freq=(1, 0, 1)))
    with pytest.raises(MappingError, match="transformers' DeepSeek has no such layers"):
        models.render_config(scattered, "hf")
    for every, expected in ((2, (1, 0)), ([0, 1], (0, 1)), (1, None), ([1, 1], None)):
        arguments = {**models.render_config(case.model, "megatron-args"), "moe_layer_freq": every}
        assert model_of(arguments, "megatron-args").config.moe_layer_freq == expected


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("mixtral", {"num_local_experts": None, "num_experts_per_tok": 0}, "moe_router_topk is not possible"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is not that of family mixtral"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is not that"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers is of the wrong type"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is not that of family qwen2-moe"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is not that of family deepseek-v3"),
        ("deepseek_v3", {"kv_lora_rank": -1}, "kv_lora_rank is not possible"),
        ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob is not that of family deepseek-v2"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "the model is quantized.*found fp8"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types is not that of the model"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "the model is quantized.*found mxfp4"),
        ("nemotron_h", {"conv_kernel": 3}, "conv_kernel is not what Megatron-Core's layers are"),
        ("nemotron_h", {"layers_block_type": ["rnn"]}, "does not say what each layer is"),
        ("nemotron_h", {"layers_block_type": None}, "does not say what each layer is"),
        ("nemotron_h", {"hybrid_override_pattern": "M|M"}, "does not say what each layer is"),
    ],
)
def test_what_a_family_cannot_be(name: str, change: dict[str, Any], problem: str) -> None:
    config = open_case(name).checkpoint.config
    with pytest.raises(MappingError, match=problem):
        model_of({**config, **change}, "hf")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("qwen3_moe", {"moe_layer_freq": 0}, "moe_layer_freq is not possible"),
        ("qwen3_moe", {"moe_layer_freq": [0, 2]}, "moe_layer_freq is not possible"),
        ("qwen3_moe", {"moe_layer_freq": [0]}, "moe_layer_freq is not of the model's length"),
        ("qwen3_moe", {"num_experts": 10**9}, "too many experts"),
        ("nemotron_h", {"hybrid_override_pattern": "M"}, "hybrid_override_pattern is not of the model's length"),
        ("nemotron_h", {"num_experts": None}, "has no num_moe_experts"),
    ],
)
def test_impossible_arguments(name: str, change: dict[str, Any], problem: str) -> None:
    arguments = models.render_config(open_case(name).model, "megatron-args")
    with pytest.raises(MappingError, match=problem):
        model_of({**arguments, **change}, "megatron-args")


def test_yarn_that_megatron_core_has_not() -> None:
    for name in ("deepseek_v3", "gpt_oss"):
        model = open_case(name).model
        scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}
        with pytest.raises(MappingError, match="cannot express this rope scaling"):
            models.render_config(replace(model, config=replace(model.config, rope_scaling=scaling)), "megatron-args")


def test_variants_that_clash() -> None:
    tensor = from_array(_floats(2, 4, 3))
    stacked = Variant("x.*.up", ("x.*.one.*.gate", "x.*.one.*.up"))
    found = family_names({"x.1.up": tensor}, (stacked,))
    assert list(found) == ["x.1.one.0.gate", "x.1.one.0.up", "x.1.one.1.gate", "x.1.one.1.up"]
    assert found["x.1.one.1.up"].shape == (2, 3)
    with pytest.raises(MappingError, match="two stored tensors are the same one"):
        family_names({"x.1.one.0.up": tensor, "x.1.up": tensor}, (stacked,))
    for shape in ((4,), (2, 3, 3)):
        with pytest.raises(MappingError, match="is not a stack of the model's experts"):
            family_names({"x.1.up": from_array(_floats(*shape))}, (stacked,))


def _floats(*shape: int) -> Any:
    import numpy as np

    return np.zeros(shape, np.float32)


def test_casts_leave_routing_and_decay_alone() -> None:
    for name in ("deepseek_v3", "nemotron_h"):
        hub = open_case(name).hub().tensors
        wide: dict[str, LazyTensor] = {key: tensor.cast("float32") for key, tensor in hub.items()}
        cast = cast_weights(wide, "float16", KEEP_IN_FP32)
        kept = {key.rpartition(".")[2] for key, tensor in cast.tensors.items() if tensor.dtype.name == "float32"}
        assert kept == ({"expert_bias", "A_log", "D", "dt_bias"} if name == "nemotron_h" else {"expert_bias"})


def test_norms_under_the_local_specification() -> None:
    """Without Transformer Engine, norms are modules of their own, in latent attention too."""
    case = open_case("deepseek_v3")
    local = {
        key.replace("linear_q_up_proj.layer_norm_", "q_layernorm.")
        .replace("linear_kv_up_proj.layer_norm_", "kv_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): tensor
        for key, tensor in case.megatron.items()
    }
    assert "decoder.layers.1.self_attention.kv_layernorm.weight" in local
    hub = models.to_hub(with_weights(case.checkpoint, local), case.padded())
    assert set(hub.tensors) == set(case.megatron)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(FAMILIES), st.sampled_from(models.KINDS), st.data())
def test_a_hostile_value_is_an_error_of_ours_or_nothing(name: str, kind: str, data: st.DataObject) -> None:
    if kind in UNSAYABLE.get(name, ()):
        return
    config = json.loads(json.dumps(models.render_config(open_case(name).model, kind)))
    inner = config["config"] if kind == "nemo2" else config
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(PLAIN)
    try:
        model = models.identify(Checkpoint("x", "x", {}, config=config, config_kind=kind))
        if model is not None:
            for other in models.KINDS:
                if other not in UNSAYABLE.get(name, ()):
                    models.render_config(model, other)
    except AnyckptError as error:
        assert "\n" not in str(error)
