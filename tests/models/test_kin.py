"""Families that differ from another in a few keys: what those mean, and what they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.models.cases import facts, with_weights
from tests.models.proofs import Opened, samples, values
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.operations.steps.layout_request import LayoutRequest

SAMPLES = samples()


def identified(name: str, **config: Any) -> models.Model:
    checkpoint = SAMPLES[name].open()[0]
    model = models.identify(replace(checkpoint, config={**checkpoint.config, **config}))
    assert model is not None
    return model


def with_layers_after(name: str) -> Opened:
    """The sample with a layer of multi-token prediction."""
    checkpoint = SAMPLES[name].open()[0]
    return made(name, {**checkpoint.config, "num_nextn_predict_layers": 1})


def made(name: str, config: dict[str, Any]) -> Opened:
    """A model of such a configuration, of random values."""
    model = models.identify(Checkpoint(name, "hf", {}, dialect="hf", config=config, config_kind="hf"))
    assert model is not None
    tensors = {}
    for item in model.definition.expected(model.config):
        shapes = item.rule.operation.source_shapes(item.shape, item.config)
        tensors |= {n: values(n, tuple(s)) for n, s in zip(item.sources, shapes, strict=True)}
    whole = Checkpoint(name, "hf", tensors, dialect="hf", config=config, config_kind="hf")
    again = models.identify(whole)
    assert again is not None
    return whole, again


def somewhere(folder: Path) -> Path:
    """An empty folder for a checkpoint that is made up."""
    (folder / "source").mkdir()
    return folder / "source"


def test_kimi_k2_is_deepseek_v3() -> None:
    model = SAMPLES["moonlight"].open()[1]
    for config in (
        {"model_type": "kimi_k2"},
        {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
        {"model_type": "kimi_next", "architectures": ["KimiK2ForCausalLM"]},
    ):
        found = identified("moonlight", **config)
        assert found.config == replace(model.config, extra=found.config.extra)
        assert models.render_config(found, "hf")["model_type"] == "deepseek_v3"


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.5-air", "glm-4.7-flash"])
def test_layers_of_multi_token_prediction(name: str) -> None:
    """Named as in the published files: after the last layer, with norms, a projection and the head's norm beside it."""
    checkpoint, model = with_layers_after(name)
    assert model.config.mtp_num_layers == 1
    after = {key.removeprefix("model.layers.4.") for key in checkpoint.tensors if key.startswith("model.layers.4.")}
    beside = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert after - beside == {
        key.removeprefix("model.layers.3.") for key in checkpoint.tensors if key.startswith("model.layers.3.")
    }
    hub = models.to_hub(checkpoint, model)
    assert "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight0" in hub.tensors
    back = models.from_hub(models.to_hub(with_weights(checkpoint, hub.tensors, "hub"), model), "hf")
    assert facts(back.tensors) == facts(checkpoint.tensors)


@pytest.mark.parametrize("value", [["sparse"], "sparse", ["dense", "dense", "dense", 7], [[]] * 4])
def test_layers_that_have_experts_are_listed_right(value: Any) -> None:
    with pytest.raises(MappingError, match="mlp_layer_types is not that of the model"):
        identified("glm-4.7-flash", mlp_layer_types=value)


def test_layers_with_experts_are_counted_or_listed() -> None:
    listed = ["dense"] * 3 + ["sparse"]
    assert identified("glm-4.7-flash").config.moe_layer_freq == (0, 1, 1, 1)
    assert identified("glm-4.7-flash", first_k_dense_replace=2).config.moe_layer_freq == (0, 0, 1, 1)
    both = identified("glm-4.7-flash", first_k_dense_replace=2, mlp_layer_types=listed)
    assert both.config.moe_layer_freq == (0, 0, 0, 1)
    assert models.render_config(both, "hf")["mlp_layer_types"] == listed


@pytest.mark.parametrize("value", [[1, 0], "1111", [1, 1, 2, 1], 4])
def test_layers_without_rope_are_listed_right(value: Any) -> None:
    with pytest.raises(MappingError, match="no_rope_layers is not that of the model"):
        identified("smollm3", no_rope_layers=value)


def test_layers_without_rope() -> None:
    assert identified("smollm3").config.no_rope_freq == (0, 0, 0, 1)
    assert identified("smollm3", no_rope_layer_interval=2).config.no_rope_freq == (0, 1, 0, 1)
    with pytest.raises(MappingError, match="use_sliding_window is not that of family smollm3"):
        identified("smollm3", use_sliding_window=True)


def test_seed_oss_has_no_other_biases() -> None:
    assert identified("seed-oss").config.add_qkv_bias
    with pytest.raises(MappingError, match="attention_out_bias is not that of family seed-oss"):
        identified("seed-oss", attention_out_bias=True)


def test_exaone4_rotates_in_windows_alone() -> None:
    assert identified("exaone4").config.no_rope_freq is None
    windows = identified("exaone4-window").config
    assert (windows.window_attn_skip_freq, windows.no_rope_freq) == (4, (0, 0, 0, 1))
    letters = identified("exaone4-window", layer_types=None, sliding_window_pattern="LG").config
    assert (letters.window_attn_skip_freq, letters.no_rope_freq) == (2, (0, 1, 0, 1))
    assert identified("exaone4-window", layer_types=None, sliding_window_pattern=0).config.window_size is None
    other = replace(windows, no_rope_freq=None)
    model = identified("exaone4-window")
    with pytest.raises(MappingError, match="rotates in layers with a window alone"):
        models.render_config(replace(model, config=other), "hf")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("olmoe", "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec"),
        ("exaone4", "megatron.bridge.models.exaone.exaone4.exaone4_provider.exaone4_layer_spec"),
    ],
)
def test_run_config_names_the_layers_of_the_family(name: str, function: str, tmp_path: Path) -> None:
    source = replace(SAMPLES[name].open()[0], path=str(somewhere(tmp_path)))
    done = anyckpt.convert(source, tmp_path / "out", to="megatron-bridge")
    assert any(function in note for note in done.notes)
    (written,) = tmp_path.rglob("run_config.yaml")
    assert yaml.safe_load(written.read_text())["model"]["transformer_layer_spec"] == {
        "_target_": function,
        "_call_": False,
    }
    found = anyckpt.inspect(tmp_path / "out")
    assert found.family == name


@pytest.mark.parametrize("name", ["granite", "granitemoe"])
def test_multipliers_stay_in_the_configuration(name: str, tmp_path: Path) -> None:
    checkpoint, model = SAMPLES[name].open()
    rendered = models.render_config(model, "hf")
    keys = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    assert [rendered[key] for key in keys] == [checkpoint.config[key] for key in keys] == [12.0, 0.22, 0.2, 8.0]
    with pytest.raises(MappingError, match="Megatron-Core has no models of family granite"):
        anyckpt.convert(replace(checkpoint, path=str(somewhere(tmp_path))), tmp_path / "out", to="megatron-core")
    with pytest.raises(MappingError, match="embedding_multiplier changes what the model computes"):
        models.identify(checkpoint, family="llama")


def test_rope_of_olmo3_is_scaled_without_a_window_alone() -> None:
    scaled = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
    found = identified("olmo3", rope_parameters=None, rope_theta=3e5, rope_scaling=scaled).config
    assert (found.rotary_base, found.rotary_base_local, found.rope_scaling) == (3e5, 3e5, scaled)
    assert identified("olmo3").config.rotary_base_local == 500_000.0
    with pytest.raises(MappingError, match="scales rope in layers with a window"):
        identified("olmo3", rope_parameters={"sliding_attention": {"rope_type": "yarn", "factor": 2.0}})


@pytest.mark.parametrize("name", ["olmo2", "granite", "granitemoe", "cohere2", "hunyuan", "falcon-h1", "lfm2"])
def test_what_megatron_cannot_compute_does_not_go_there(name: str, tmp_path: Path) -> None:
    source = replace(SAMPLES[name].open()[0], path=str(somewhere(tmp_path)))
    for target in ("megatron-core", "megatron-bridge", "nemo", "nemo2"):
        with pytest.raises(MappingError, match="has no models of family"):
            anyckpt.convert(source, tmp_path / "out", to=target)
    anyckpt.convert(source, tmp_path / "out", to="safetensors", names="hub")
    assert set(anyckpt.open(tmp_path / "out").tensors) == set(models.to_hub(*SAMPLES[name].open()).tensors)


def test_layers_of_ernie_that_have_experts() -> None:
    assert identified("ernie-4.5-moe").config.moe_layer_freq == (0, 1, 1, 1)
    assert identified("ernie-4.5-moe", moe_layer_end_index=2).config.moe_layer_freq == (0, 1, 1, 0)
    model = identified("ernie-4.5-interval")
    assert model.config.moe_layer_freq == (0, 1, 0, 1)
    with pytest.raises(MappingError, match="ERNIE has no such layers"):
        models.render_config(replace(model, config=replace(model.config, moe_layer_freq=(1, 1, 0, 1))), "hf")
    notes: list[str] = []
    models.render_config(model, "megatron-args", notes=notes)
    assert any("scores are by softmax" in note for note in notes)


def test_what_ernie_predicts_further_is_left_out_by_name(tmp_path: Path) -> None:
    """As published: names are those that converters of other projects leave out."""
    source, model = samples()["ernie-4.5-moe"].open()
    block = ("input_layernorm", "self_attn.q_proj", "mlp.gate_proj", "mlp.gate", "mlp.experts.3.up_proj",
             "mlp.shared_experts.down_proj")  # fmt: skip
    further = {f"model.mtp_block.0.{name}.weight": values(name, (4,)) for name in block}
    further["model.mtp_block.0.mlp.moe_statics.e_score_correction_bias"] = values("bias", (1, 8))
    further |= {f"model.mtp_{name}.0.weight": values(name, (4,)) for name in ("emb_norm", "hidden_norm", "linear_proj")}
    published = replace(
        source, tensors={**source.tensors, **further}, config={**source.config, "num_nextn_predict_layers": 1}
    )
    hub = models.to_hub(published, model)
    assert hub.ignored.keys() == further.keys()
    assert all("a step of multi-token prediction" in reason for reason in hub.ignored.values())
    assert hub.tensors.keys() == models.to_hub(source, model).tensors.keys()
    assert FORMAT.plan is not None
    folder = write_plan(FORMAT.plan(published, WriteOptions()), tmp_path / "published")
    done = anyckpt.convert(folder, tmp_path / "megatron", to="megatron-core")
    assert further.keys() <= set(done.lost())
    anyckpt.convert(folder, tmp_path / "hf", to="hf", dtype="bf16")
    assert set(registry.read(str(tmp_path / "hf")).tensors) == {*source.tensors, *further}


def test_ernie_and_granite_are_not_llama() -> None:
    for name, why in (("ernie-4.5", "rotary_interleaved"), ("granite", "_multiplier"), ("cohere2", "LayerNorm")):
        with pytest.raises(MappingError, match=why):
            models.identify(SAMPLES[name].open()[0], family="llama")


def test_channels_that_minimax_rotates() -> None:
    assert identified("minimax-m2-partial", rope_parameters=None).config.rotary_percent == 0.5
    assert identified("minimax-m2", rope_parameters=None).config.rotary_percent == 1.0
    both = identified("minimax-m2", rotary_dim=4, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert both.config.rotary_percent == 0.5
    with pytest.raises(MappingError, match="qk_norm_type is not that of family minimax-m2"):
        identified("minimax-m2", qk_norm_type="per_head")


def test_norms_of_all_heads_are_cut_with_them(tmp_path: Path) -> None:
    """Megatron-Bridge's class keeps on each rank the part of the norm that is of its heads."""
    source = replace(SAMPLES["minimax-m2"].open()[0], path=str(somewhere(tmp_path)))
    anyckpt.convert(source, tmp_path / "out", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    ranks = registry.read(tmp_path / "out").ranks
    shapes = [rank.tensors["decoder.layers.0.self_attention.q_layernorm.weight"].shape for rank in ranks]
    assert shapes == [(32,), (32,)]


def test_biases_of_internlm3() -> None:
    released = identified("internlm3", mlp_bias=None, attention_bias=None, bias=False, qkv_bias=False)
    assert not released.config.add_bias_linear
    assert models.render_config(identified("internlm3-biased"), "hf")["qkv_bias"] is True


def test_queries_of_ministral_that_grow_are_told() -> None:
    notes: list[str] = []
    model = identified("ministral3")
    arguments = models.render_config(model, "megatron-args", notes=notes)
    assert (arguments["position_embedding_type"], arguments["llama_4_scaling_beta"]) == ("yarn", 0.1)
    assert any("does not scale queries by position" in note for note in notes)
    checkpoint = SAMPLES["ministral3"].open()[0]
    silent = {key: value for key, value in checkpoint.config.items() if key != "rope_parameters"}
    whole = models.identify(replace(checkpoint, config=silent))
    assert whole is not None
    assert (whole.config.rope_scaling or {})["llama_4_scaling_beta"] == 0.1
    repeated = {**model.config.rope_scaling, "rope_theta": 1e4, "max_position_embeddings": 64}  # type: ignore[dict-item]
    assert identified("ministral3", rope_parameters=repeated).config.rope_scaling == model.config.rope_scaling


def test_a_step_of_multi_token_prediction_of_nemotron(tmp_path: Path) -> None:
    """The published files count its layers from 0, and have what joins and ends the step on the first and last."""
    sample = SAMPLES["nemotron-3-super"].open()[0]
    config = {**sample.config, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    checkpoint, model = made(sample.path, config)
    after = [key for key in checkpoint.tensors if key.startswith("mtp.")]
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.0.enorm.weight", "mtp.layers.0.mixer.q_proj.weight"} <= {*after}
    assert {"mtp.layers.1.mixer.experts.3.up_proj.weight", "mtp.layers.1.final_layernorm.weight"} <= {*after}
    assert "mtp.layers.0.final_layernorm.weight" not in after
    hub = models.to_hub(checkpoint, model)
    assert "mtp.layers.0.transformer_layer.layers.1.mlp.fc1_latent_proj.weight" in hub.tensors
    for dialect in ("hub", "megatron-core"):
        named = models.from_hub(hub, dialect).tensors
        arguments = models.render_config(model, "megatron-args")
        assert arguments["hybrid_override_pattern"] == "ME*E/*E"
        between = replace(with_weights(checkpoint, named), config=arguments, config_kind="megatron-args")
        again = models.identify(between)
        assert again is not None
        assert (again.family, again.config.mtp_hybrid_override_pattern) == ("nemotron-h", "*E")
        assert facts(models.from_hub(models.to_hub(between, again), "hf").tensors) == facts(checkpoint.tensors)
    assert "mtp_layers_block_type" in models.render_config(model, "hf")
    source = replace(checkpoint, path=str(somewhere(tmp_path)))
    anyckpt.convert(source, tmp_path / "two", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    anyckpt.convert(tmp_path / "two", tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(checkpoint.tensors)


@pytest.mark.parametrize("wrong", [{"num_nextn_predict_layers": 2}, {"mtp_hybrid_override_pattern": "*Q"}])
def test_steps_that_nemotron_has_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(MappingError, match="layers of multi-token prediction are not those"):
        identified("nemotron-3-super", **{"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", **wrong})


def test_width_of_lfm2_is_computed_or_stated() -> None:
    """transformers: two thirds of what is stated, times a factor, up to a multiple."""
    stated = {"intermediate_size": 48, "block_multiple_of": 8}
    assert identified("lfm2", **stated).config.ffn_hidden_size == 32
    assert identified("lfm2", **stated, block_ffn_dim_multiplier=1.3).config.ffn_hidden_size == 48
    assert identified("lfm2", **stated, block_auto_adjust_ff_dim=False).config.ffn_hidden_size == 48
    assert identified("lfm2", block_ff_dim=96, block_multiple_of=8).config.ffn_hidden_size == 64
    with pytest.raises(MappingError, match="width of the MLP is not possible"):
        identified("lfm2", block_multiple_of=-8)


@pytest.mark.parametrize("value", [["conv"], "conv", ["conv", "mamba", "conv", "conv"]])
def test_layers_of_lfm2_are_listed_right(value: Any) -> None:
    with pytest.raises(MappingError, match="layer_types is not that of the model"):
        identified("lfm2", layer_types=value)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "XLMRobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_encoders_keep_their_type(name: str) -> None:
    checkpoint, model = SAMPLES[name].open()
    rendered = models.render_config(model, "hf")
    assert rendered["model_type"] == checkpoint.config["model_type"]
    assert rendered["architectures"] == [name]


def test_layers_of_modernbert_that_have_a_window() -> None:
    model = identified("ModernBertForMaskedLM")
    assert (model.config.window_size, model.config.window_attn_skip_freq) == ((4, 4), (0, 1, 1, 0))
    older = identified("ModernBertForMaskedLM", layer_types=None, global_attn_every_n_layers=2, rope_parameters=None)
    assert older.config.window_attn_skip_freq == (0, 1, 0, 1)
    assert (older.config.rotary_base, older.config.rotary_base_local) == (160_000.0, 10_000.0)
    assert models.render_config(older, "hf")["global_attn_every_n_layers"] == 2
    assert identified("ModernBertForMaskedLM", global_attn_every_n_layers=1).config.window_size is None
    for wrong in ({"layer_types": ["full_attention"]}, {"local_attention": 1}):
        with pytest.raises(MappingError, match="is not (that of the model|possible)"):
            identified("ModernBertForMaskedLM", **wrong)


def test_kimi_k25_is_kimi_k2_beside_its_tower(tmp_path: Path) -> None:
    text = SAMPLES["moonlight"].open()[0]
    beside = {
        "vision_tower.encoder.blocks.0.norm0.weight": (8,),
        "vision_tower.patch_embed.proj.weight": (8, 3, 2, 2),
        "mm_projector.proj.0.weight": (8, 8),
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in text.tensors.items()}
    tensors |= {name: values(name, shape) for name, shape in beside.items()}
    config = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": {**text.config, "model_type": "kimi_k2"},
        "vision_config": {"model_type": "kimi_k25_vision", "hidden_size": 8},
        "tie_word_embeddings": False,
    }
    source = replace(text, tensors=tensors, config=config, path=str(somewhere(tmp_path)))
    anyckpt.convert(source, tmp_path / "out", to="megatron-core")
    assert anyckpt.inspect(tmp_path / "out").family == "deepseek-v3"
    anyckpt.convert(tmp_path / "out", tmp_path / "back", to="hf")
    back = anyckpt.open(tmp_path / "back")
    assert facts(back.tensors) == facts(tensors)
    assert back.config["model_type"] == "kimi_k25"


def test_width_of_falcon_h1s_mixer() -> None:
    assert identified("falcon-h1").config.mamba_head_dim == 8
    assert identified("falcon-h1", mamba_d_head="auto", mamba_d_ssm=None).config.mamba_head_dim == 16
    rendered = models.render_config(SAMPLES["falcon-h1"].open()[1], "hf")
    assert (rendered["mamba_d_head"], rendered["mamba_d_ssm"], rendered["ssm_in_multiplier"]) == (8, 32, 1.25)
    with pytest.raises(MappingError, match="projectors_bias is not what is known"):
        identified("falcon-h1", projectors_bias=True)


_GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
_COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "cache_implementation": "hybrid", "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4,
    "logit_scale": 0.25, "max_position_embeddings": 8192, "model_type": "cohere2", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
    "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": True, "vocab_size": 256000,
}  # fmt: skip
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
_LFM2 = {
    "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-05, "block_use_swiglu": True,
    "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048, "max_position_embeddings": 128000, "model_type": "lfm2", "norm_eps": 1e-05,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0,
    "tie_embedding": True, "use_pos_enc": True, "vocab_size": 65536,
}  # fmt: skip
_EXAONE_4_32B = {
    "architectures": ["Exaone4ForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 27392, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "sliding_window": 4096,
    "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "sliding_window_pattern": "LLLG", "tie_word_embeddings": False, "vocab_size": 102400,
}  # fmt: skip
_ERNIE_21B = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
    "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk",
    "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 28, "moe_layer_interval": 1,
    "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True,
    "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False, "vocab_size": 103424,
}  # fmt: skip
_MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608, "model_type": "minimax_m2",
    "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "num_local_experts": 256, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000,
    "rotary_dim": 64, "router_aux_loss_coef": 0.001, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
    "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "family", "said"),
    [
        (_GLM_4_5_AIR, "glm4-moe", {"rotary_percent": 0.5, "moe_shared_expert_intermediate_size": 1408}),
        (_COMMAND_R7B, "cohere2", {"window_attn_skip_freq": 4, "share_embeddings_and_output_weights": True}),
        (_SMOLLM3, "smollm3", {"no_rope_freq": (0, 0, 0, 1) * 9, "rotary_base": 5e6}),
        (_LFM2, "lfm2", {"ffn_hidden_size": 8192, "share_embeddings_and_output_weights": True}),
        (_EXAONE_4_32B, "exaone4", {"window_size": (4095, 0), "window_attn_skip_freq": 4}),
        (_ERNIE_21B, "ernie4-5-moe", {"moe_layer_freq": (0, *(1,) * 27), "moe_shared_expert_intermediate_size": 3072}),
        (_MINIMAX_M2, "minimax-m2", {"rotary_percent": 0.5, "moe_ffn_hidden_size": 1536}),
    ],
)
def test_published_configurations_are_read(config: dict[str, Any], family: str, said: dict[str, Any]) -> None:
    """Keys as they are in the ``config.json`` of released models, with what those say besides."""
    model = models.identify(Checkpoint(family, "hf", {}, dialect="hf", config=config, config_kind="hf"))
    assert model is not None
    assert (model.family, {key: getattr(model.config, key) for key in said}) == (family, said)
    again = models.render_config(model, "hf")
    back = models.identify(Checkpoint(family, "hf", {}, dialect="hf", config=again, config_kind="hf"))
    assert back is not None
    assert replace(back.config, extra={}) == replace(model.config, extra={})
