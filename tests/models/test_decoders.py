"""What is particular about each dense decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, model_of, notes_of, open_case, with_weights

from anyckpt import models
from anyckpt.config.windows import windowed_layers
from anyckpt.errors import MappingError
from anyckpt.tensor import from_array

NEMO2 = "nemo.collections.llm.gpt.model"


# -- windows -------------------------------------------------------------------------------------------------

QWEN2 = {
    "model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "sliding_window": 8,
    "num_key_value_heads": 4, "use_sliding_window": True, "max_window_layers": 2,
}  # fmt: skip


def test_qwen_windows_the_last_layers() -> None:
    config = model_of(QWEN2).config
    assert (config.window_size, config.window_attn_skip_freq) == ((7, 0), (0, 0, 1, 1))
    rendered = models.render_config(model_of(QWEN2), "hf")
    assert (rendered["sliding_window"], rendered["max_window_layers"]) == (8, 2)
    assert rendered["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    for kind in ("nemo1", "nemo2", "megatron-args"):
        told = models.render_config(model_of(QWEN2), kind)
        inner = told["config"] if kind == "nemo2" else told
        assert (inner["window_size"], inner["window_attn_skip_freq"]) == ([7, 0], [0, 0, 1, 1])
        assert model_of(told).config.window_attn_skip_freq == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "change",
    [{"use_sliding_window": False}, {"sliding_window": None}, {"max_window_layers": 4}, {"use_sliding_window": None}],
)
def test_qwen_without_windows(change: dict[str, Any]) -> None:
    model = model_of({**QWEN2, **change})
    assert (model.config.window_size, model.config.window_attn_skip_freq) == (None, None)
    rendered = models.render_config(model, "hf")
    assert (rendered["use_sliding_window"], rendered["sliding_window"]) == (False, None)
    assert rendered["layer_types"] == ["full_attention"] * 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types is not that of the model"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is not that of the model"),
        ({"layer_types": [[]] * 4}, "layer_types is not that of the model"),
        ({"layer_types": "full"}, "layer_types is not that of the model"),
        ({"sliding_window": 0}, "sliding_window is not possible"),
        ({"sliding_window": "8"}, "sliding_window is of the wrong type"),
    ],
)
def test_windows_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        model_of({**QWEN2, **change})


@pytest.mark.parametrize(
    ("frequency", "problem"),
    [(0, "not possible"), ([1, 0], "not possible"), ("2", "of the wrong type"), ([1, 0, 2, 1], "of the wrong type")],
)
def test_frequencies_that_cannot_be(frequency: Any, problem: str) -> None:
    arguments = models.render_config(model_of(QWEN2), "megatron-args")
    with pytest.raises(MappingError, match=f"window_attn_skip_freq is {problem}"):
        model_of({**arguments, "window_attn_skip_freq": frequency})


def test_gemma_2_windows_every_other_layer_from_the_first() -> None:
    model = open_case("gemma2").model
    assert windowed_layers(model.config) == [True, False]
    assert model.config.window_attn_skip_freq == 2
    without = {key: value for key, value in open_case("gemma2").checkpoint.config.items() if key != "layer_types"}
    assert model_of(without).config == model.config
    assert "second, fourth" in notes_of(model, "nemo2")
    assert "second, fourth" in notes_of(model, "nemo1")
    assert "norms after attention" in notes_of(model, "megatron-args")
    assert notes_of(model, "hf") == ""


def test_gemma_2_of_nemo_has_no_word_for_its_layers() -> None:
    config = {"_target_": f"{NEMO2}.gemma2.Gemma2Config9B"}
    parsed = model_of(config).config
    assert (parsed.window_size, parsed.window_attn_skip_freq) == ((4096, 0), 2)
    assert (parsed.query_pre_attn_scalar, parsed.attn_logit_softcapping, parsed.final_logit_softcapping) == (
        256,
        50,
        30,
    )
    assert model_of({**config, "window_size": None}).config.window_attn_skip_freq is None


def test_null_soft_caps_stay_null() -> None:
    config = {**open_case("gemma2").checkpoint.config, "attn_logit_softcapping": None}
    rendered = models.render_config(model_of(config), "hf")
    assert rendered["attn_logit_softcapping"] is None
    assert rendered["final_logit_softcapping"] == 3.0
    assert type(rendered["query_pre_attn_scalar"]) is int


# -- Gemma ---------------------------------------------------------------------------------------------------


def test_gemma_3_in_the_first_spelling() -> None:
    """As transformers 4.50 wrote it: one theta beside the other, and a period instead of layers."""
    config = dict(open_case("gemma3").checkpoint.config)
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del config[key]
    config |= {
        "rope_theta": 1e6, "rope_local_base_freq": 20000.0, "sliding_window_pattern": 3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    model = model_of(config)
    assert (model.config.rotary_base, model.config.rotary_base_local) == (1e6, 20000.0)
    assert windowed_layers(model.config) == [True, True, False] * 2
    rendered = models.render_config(model, "hf")
    assert rendered["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert rendered["sliding_window_pattern"] == 3
    assert rendered["rope_parameters"] == {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 20000.0, "rope_type": "default"},
    }
    nemo2 = models.render_config(model, "nemo2")["config"]
    assert (nemo2["rotary_base"], nemo2["interleaved_attn_pattern"]) == ([20000, 1000000], [2, 1])
    assert (nemo2["window_size"], nemo2["rope_scaling_factor"]) == (5, 8.0)


def test_gemma_3_of_nemo() -> None:
    config = model_of({"_target_": f"{NEMO2}.gemma3.Gemma3Config27B"}).config
    assert (config.rotary_base, config.rotary_base_local, config.window_size) == (1e6, 1e4, (1024, 0))
    assert (config.query_pre_attn_scalar, config.window_attn_skip_freq) == (168, 6)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    for change in ({"interleaved_attn_pattern": [0, 1]}, {"interleaved_attn_pattern": [5, 2]}, {"window_size": -1}):
        with pytest.raises(MappingError, match="interleaved_attn_pattern is not possible"):
            model_of({"_target_": f"{NEMO2}.gemma3.Gemma3Config27B", **change})


def test_gemma_3_that_nemo_cannot_express() -> None:
    model = open_case("gemma3").model
    for change in (
        {"rotary_base_local": 10000.5},
        {"window_attn_skip_freq": (1, 0, 1, 1, 0, 1)},
        {"window_size": None},
    ):
        if change == {"window_size": None}:
            change = {**change, "window_attn_skip_freq": None}
        with pytest.raises(MappingError, match="Gemma 3 cannot express"):
            models.render_config(replace(model, config=replace(model.config, **change)), "nemo2")


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_gemma_that_sees_the_whole_text(name: str) -> None:
    with pytest.raises(MappingError, match="use_bidirectional_attention"):
        model_of({**open_case(name).checkpoint.config, "use_bidirectional_attention": True})


def test_gemma_by_the_name_of_another_gelu() -> None:
    """The first releases say gelu and mean its approximation."""
    config = {**open_case("gemma").checkpoint.config, "hidden_act": "gelu", "hidden_activation": None}
    assert model_of(config).config.activation == "gelu_tanh"
    assert models.render_config(model_of(config), "hf")["hidden_act"] == "gelu_pytorch_tanh"
    model = open_case("gemma").model
    nemo1 = models.render_config(model, "nemo1")
    assert (nemo1["activation"], nemo1["openai_gelu"], nemo1["apply_embedding_scaling"]) == ("geglu", True, True)
    assert (nemo1["normalization"], nemo1["layernorm_zero_centered_gamma"]) == ("rmsnorm", True)
    assert "gated gelu_tanh" in notes_of(model, "megatron-args")
    assert "square root of hidden_size" in notes_of(model, "megatron-args")


# -- others --------------------------------------------------------------------------------------------------


def test_phi_3_with_long_rope_stays_in_transformers() -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = {**open_case("phi3").checkpoint.config, "rope_scaling": scaling}
    del config["rope_parameters"]
    model = model_of(config)
    assert models.render_config(model, "hf")["rope_scaling"]["long_factor"] == [2.0] * 8
    for kind in ("nemo1", "nemo2", "megatron-args"):
        with pytest.raises(MappingError, match="cannot express this rope scaling"):
            models.render_config(model, kind)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.Qwen25Config3B", (36, 2048, 128, 2, "silu", True, 1e6)),
        ("qwen3.Qwen3Config600M", (28, 1024, 128, 8, "silu", True, 1e6)),
        ("gemma.GemmaConfig2B", (18, 2048, 256, 1, "gelu_tanh", True, 1e4)),
        ("phi3mini.Phi3ConfigMini", (32, 3072, 96, 32, "silu", False, 1e4)),
        ("starcoder.StarcoderConfig15B", (40, 6144, 128, 1, "gelu", True, 1e4)),
        ("starcoder2.Starcoder2Config7B", (32, 4608, 128, 4, "gelu", False, 1e6)),
        ("nemotron.Nemotron4Config340B", (96, 18432, 192, 8, "squared_relu", False, 1e4)),
        ("base.GPTConfig126M", (12, 768, 64, 12, "gelu", True, 1e4)),
    ],
)
def test_nemo_2_classes_have_defaults(name: str, expected: tuple[Any, ...]) -> None:
    config = model_of({"_target_": f"{NEMO2}.{name}"}).config
    found = (
        config.num_layers, config.hidden_size, config.kv_channels, config.num_query_groups, config.activation,
        config.share_embeddings_and_output_weights, config.rotary_base,
    )  # fmt: skip
    if name == "starcoder.StarcoderConfig15B":
        expected = (*expected[:5], False, expected[6])
    assert found == expected


def test_the_gelu_of_nemos_starcoders_is_told() -> None:
    for name in ("starcoder.StarcoderConfig15B", "starcoder2.Starcoder2Config7B"):
        model = model_of({"_target_": f"{NEMO2}.{name}", "vocab_size": 49152})
        assert "gelu_pytorch_tanh" in notes_of(model, "hf")


def test_gpt_2_as_it_was_first_stored() -> None:
    """Without a prefix, and with masks."""
    case = open_case("gpt2")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in case.checkpoint.tensors.items()}
    masks = {
        "h.0.attn.bias": from_array(np.zeros((1, 1, 4, 4), "<f4")),
        "h.1.attn.masked_bias": from_array(np.zeros(1)),
    }
    hub = models.to_hub(with_weights(case.checkpoint, {**weights, **masks}, "hf"), case.model)
    assert facts(hub.tensors) == facts(case.hub().tensors)
    assert hub.ignored == dict.fromkeys(masks, "a mask, which follows from the configuration")
    assert facts(models.from_hub(hub, "hf").tensors) == facts(case.checkpoint.tensors)
    with pytest.raises(MappingError, match="no rule of family gpt2 covers 28 tensors: h.0.attn.c_attn.bias"):
        models.to_hub(with_weights(case.checkpoint, {**weights, **case.checkpoint.tensors}, "hf"), case.model)


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"])
def test_gpt_2_that_megatron_has_no_layers_for(key: str) -> None:
    with pytest.raises(MappingError, match=f"{key} is not that of family gpt2"):
        model_of({**open_case("gpt2").checkpoint.config, key: True})


def test_key_heads_that_a_class_cannot_have() -> None:
    big, small = open_case("starcoder_gpt_bigcode").model, open_case("gpt2").model
    with pytest.raises(MappingError, match="one key head, or one for each"):
        models.render_config(replace(big, config=replace(big.config, num_query_groups=2)), "hf")
    every = replace(big, config=replace(big.config, num_query_groups=big.config.num_attention_heads))
    assert models.render_config(every, "hf")["multi_query"] is False
    for name in ("num_query_groups", "kv_channels"):
        with pytest.raises(MappingError, match=f"GPT2LMHeadModel has no key for {name}"):
            models.render_config(replace(small, config=replace(small.config, **{name: 2})), "hf")


def test_layers_in_parallel_are_told() -> None:
    config = {**open_case("gpt_neox").checkpoint.config, "use_parallel_residual": True}
    model = model_of(config)
    assert model.config.parallel_residual
    for kind in ("nemo1", "megatron-args"):
        assert "run in parallel" in notes_of(model, kind)
        assert model_of(models.render_config(model, kind)).config.parallel_residual
    with pytest.raises(MappingError, match="NeMo 2's models of family gpt_neox have no parallel_residual"):
        models.render_config(model, "nemo2")


FALCON = {
    "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "groups", "norms"),
    [
        ({}, 1, ["input_layernorm"]),
        ({"multi_query": False}, 8, ["input_layernorm"]),
        ({"parallel_attn": False}, 1, ["input_layernorm", "post_attention_layernorm"]),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, ["ln_attn", "ln_mlp"]),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            2,
            ["input_layernorm"],
        ),
        ({"bias": True, "alibi": True, "multi_query": False, "parallel_attn": False}, 8,
         ["input_layernorm", "post_attention_layernorm"]),
    ],
)  # fmt: skip
def test_falcons_layouts(change: dict[str, Any], groups: int, norms: list[str]) -> None:
    model = model_of({**FALCON, **change})
    assert (model.config.num_query_groups, model.config.add_bias_linear) == (groups, "bias" in change)
    names = [name for item in model.definition.expected(model.config) for name in item.sources]
    found = [name.split(".")[3] for name in names if name.startswith("transformer.h.1.") and name.endswith(".weight")]
    assert [name for name in found if name not in ("self_attention", "mlp")] == norms
    again = model_of(models.render_config(model, "hf"))
    assert again.config == replace(model.config, extra=again.config.extra)
    for kind in ("nemo1", "megatron-args"):
        if kind == "megatron-args" and "alibi" in change:
            with pytest.raises(MappingError, match=r"no such position embedding .*found alibi"):
                models.render_config(model, kind)
        else:
            back = model_of(models.render_config(model, kind)).config
            assert (back.num_query_groups, back.parallel_residual) == (groups, model.config.parallel_residual)
            assert back.shared_layernorm == model.config.shared_layernorm
    if "alibi" in change:
        with pytest.raises(MappingError, match="NeMo 2 has no such position embedding"):
            models.render_config(model, "nemo2")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "runs attention and MLP in parallel"),
        ({"num_ln_in_parallel_attn": 2}, "two norms before a layer of the old architecture"),
        ({"activation": "relu"}, "activation is not that of family falcon"),
    ],
)
def test_falcons_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        model_of({**FALCON, **change})
    sequential = model_of({**FALCON, "parallel_attn": False})
    with pytest.raises(MappingError, match="groups of heads run attention and MLP in parallel"):
        models.render_config(replace(sequential, config=replace(sequential.config, num_query_groups=2)), "hf")


def test_falcon_as_it_was_first_configured() -> None:
    old = {
        "model_type": "RefinedWeb", "n_layer": 2, "n_head": 8, "n_head_kv": 2, "hidden_size": 64, "vocab_size": 32,
        "new_decoder_architecture": True, "architectures": ["RWForCausalLM"],
    }  # fmt: skip
    model = model_of(old)
    new = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    assert replace(model.config, extra={}) == replace(model_of(new).config, extra={})
    assert models.render_config(model, "hf")["model_type"] == "falcon"


def test_an_activation_that_is_unknown() -> None:
    with pytest.raises(MappingError, match="hidden_act is unknown .*found laplace"):
        model_of({**open_case("starcoder2").checkpoint.config, "hidden_act": "laplace"})
    odd = open_case("starcoder2").model
    with pytest.raises(MappingError, match="NeMo 1 has no such activation .*found gated squared_relu"):
        changed = replace(odd.config, activation="squared_relu", gated_linear_unit=True)
        models.render_config(replace(odd, config=changed), "nemo1")
