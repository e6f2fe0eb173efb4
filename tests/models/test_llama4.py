"""Llama 4 as Scout and Maverick are stored, as quantizers store it, and what the frameworks cannot say of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, from_array

NEMO2 = "nemo.collections.llm.gpt.model.llama"


def opened(name: str = "llama4") -> tuple[Checkpoint, models.Model]:
    return samples()[name].open()


def changed(checkpoint: Checkpoint, **values: Any) -> models.Model:
    model = models.identify(replace(checkpoint, tensors={}, config={**checkpoint.config, **values}))
    assert model is not None
    return model


def test_an_expert_is_transposed_gate_before_up() -> None:
    checkpoint, model = opened()
    hub = models.to_hub(checkpoint, model).tensors
    stack = checkpoint.tensors["model.layers.1.feed_forward.experts.gate_up_proj"].numpy()
    config = model.config
    assert stack.shape == (4, 32, 2 * 48)
    assert np.array_equal(hub["decoder.layers.1.mlp.experts.linear_fc1.weight2"].numpy(), stack[2].T)
    down = checkpoint.tensors["model.layers.1.feed_forward.experts.down_proj"].numpy()
    assert np.array_equal(hub["decoder.layers.1.mlp.experts.linear_fc2.weight3"].numpy(), down[3].T)
    assert config.moe_shared_expert_intermediate_size == 48
    assert config.ffn_hidden_size == 40


def one_by_one(tensors: dict[str, LazyTensor], layers: set[str]) -> dict[str, LazyTensor]:
    """Experts as linear layers, as llm-compressor and its like store them."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith("feed_forward.experts") or name.split(".")[2] not in layers:
            result[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            matrix = tensor[expert].numpy().T
            parts = {"down_proj": matrix}
            if last == "gate_up_proj":
                parts = {"gate_proj": matrix[:48], "up_proj": matrix[48:]}
            for part, values in parts.items():
                result[f"{stem}.{expert}.{part}.weight"] = from_array(np.ascontiguousarray(values))
    return result


@pytest.mark.parametrize("layers", [{"0", "1", "2", "3"}, {"2"}])
def test_experts_one_by_one(layers: set[str]) -> None:
    checkpoint, model = opened()
    other = one_by_one(checkpoint.tensors, layers)
    hub = models.to_hub(with_weights(checkpoint, other, "hf"), model)
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)
    missing = "model.layers.2.feed_forward.experts.3.up_proj.weight"
    with pytest.raises(MappingError, match=f"missing: {missing}"):
        models.to_hub(with_weights(checkpoint, {k: t for k, t in other.items() if k != missing}, "hf"), model)


@pytest.mark.parametrize("shape", [(4, 32, 95), (4,), (4, 32, 2 * 40)])
def test_a_stack_of_another_shape(shape: tuple[int, ...]) -> None:
    checkpoint, model = opened()
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    tensors = {**checkpoint.tensors, name: from_array(np.zeros(shape, "<f4"))}
    with pytest.raises(MappingError, match=r"not a stack of the model's experts|shape contradicts"):
        models.to_hub(with_weights(checkpoint, tensors, "hf"), model)


def test_scout_and_maverick() -> None:
    """The text parts' keys of meta-llama's config.json that are not transformers' defaults."""
    scout = {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "llama4_text", "attn_temperature_tuning": 4, "interleave_moe_layer_step": 1,
            "no_rope_layers": [], "for_llm_compressor": False, "max_position_embeddings": 10485760,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        "vision_config": {"model_type": "llama4_vision_model"},
    }  # fmt: skip
    model = models.identify(Checkpoint("x", "hf", {}, config=scout, config_kind="hf"))
    assert model is not None
    config = model.config
    assert model.family == "llama4"
    assert (config.num_layers, config.num_moe_experts, config.moe_layer_freq) == (48, 16, None)
    assert config.no_rope_freq == (0, 0, 0, 1) * 12
    assert config.attn_temperature_tuning is True
    assert config.qk_l2_norm
    rendered = models.render_config(model, "hf")
    assert rendered["model_type"] == "llama4_text"
    assert rendered["layer_types"][:4] == ["chunked_attention"] * 3 + ["full_attention"]
    for kind, name in (("nemo2", "Megatron-Core"), ("megatron-args", "Megatron-Core")):
        with pytest.raises(MappingError, match=f"{name} cannot express this rope scaling"):
            models.render_config(model, kind)
    text = {**scout["text_config"], "rope_scaling": None, "num_local_experts": 128, "use_qk_norm": False}  # type: ignore[dict-item]
    maverick = {**scout, "text_config": {**text, "interleave_moe_layer_step": 2}}
    model = models.identify(Checkpoint("x", "hf", {}, config=maverick, config_kind="hf"))
    assert model is not None
    assert model.config.moe_layer_freq == (0, 1) * 24
    found = models.render_config(model, "nemo2")["config"]
    theirs = {"num_moe_experts": 128, "moe_layer_freq": [0, 1] * 24, "rope_scaling": False, "qk_l2_norm": False}
    assert {key: found[key] for key in theirs} == theirs, "as Llama4Experts128Config says it"


@pytest.mark.parametrize(
    ("name", "facts_of_it"),
    [
        ("Llama4Experts16Config", {"num_moe_experts": 16, "qk_l2_norm": True, "moe_layer_freq": None}),
        ("Llama4Experts128Config", {"num_moe_experts": 128, "qk_l2_norm": False, "rope_scaling": None}),
    ],
)
def test_nemo_2_classes_with_nothing_said(name: str, facts_of_it: dict[str, Any]) -> None:
    config = {"_target_": f"{NEMO2}.LlamaModel", "config": {"_target_": f"{NEMO2}.{name}"}}
    model = models.identify(Checkpoint("x", "nemo2", {}, config=config, config_kind="nemo2"))
    assert model is not None
    assert model.family == "llama4"
    expected = {
        "num_layers": 48, "hidden_size": 5120, "num_query_groups": 8, "kv_channels": 128, "moe_router_topk": 1,
        "attention_chunk_size": 8192, "rotary_interleaved": True, **facts_of_it,
    }  # fmt: skip
    assert {key: getattr(model.config, key) for key in expected} == expected
    assert model.config.no_rope_freq == (0, 0, 0, 1) * 12
    if name == "Llama4Experts16Config":
        assert model.config.rope_scaling is not None
        assert model.config.rope_scaling["factor"] == 8.0


@pytest.mark.parametrize("interval", [None, 0, 2])
def test_nemo_2_interval_without_rope(interval: int | None) -> None:
    config = {"_target_": f"{NEMO2}.Llama4Experts16Config", "num_layers": 4, "nope_layer_interval": interval}
    model = models.identify(Checkpoint("x", "nemo2", {}, config=config, config_kind="nemo2"))
    assert model is not None
    assert model.config.no_rope_freq == ((0, 1, 0, 1) if interval else None)
    assert models.render_config(model, "nemo2")["config"]["nope_layer_interval"] == (interval or None)
    assert models.render_config(model, "hf")["no_rope_layers"] == ([1, 0, 1, 0] if interval else [1, 1, 1, 1])


@pytest.mark.parametrize("frequency", [2, [0, 1, 0, 1]])
def test_megatron_cores_frequency(frequency: Any) -> None:
    checkpoint, model = opened("llama4-interleaved")
    arguments = models.render_config(model, "megatron-args")
    assert arguments["no_rope_freq"] == [0, 1, 0, 1]
    assert arguments["moe_apply_probs_on_input"] is True
    between = replace(
        checkpoint, tensors={}, config={**arguments, "no_rope_freq": frequency}, config_kind="megatron-args"
    )
    again = models.identify(between)
    assert again is not None
    assert again.config.no_rope_freq == (0, 1, 0, 1)
    for wrong in (5, -1, [0, 1], [2, 0, 0, 0], "x"):
        with pytest.raises(MappingError, match="no_rope_freq"):
            models.identify(replace(between, config={**arguments, "no_rope_freq": wrong}))


def test_switches_of_llama_4_are_no_other_familys() -> None:
    checkpoint, _ = samples()["llama"].open()
    model = models.identify(checkpoint)
    assert model is not None
    arguments = models.render_config(model, "megatron-args")
    for key, value, known in (("no_rope_freq", 2, "smollm3"), ("qk_l2_norm", True, None)):
        strange = {k: v for k, v in {**arguments, key: value}.items() if k != "hf_model_type"}
        found = models.identify(replace(checkpoint, tensors={}, config=strange, config_kind="megatron-args"))
        assert (None if found is None else found.family) == known


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"no_rope_layers": [1, 1]}, "no_rope_layers is not that of the model"),
        ({"no_rope_layers": "x"}, "no_rope_layers is of the wrong type"),
        ({"moe_layers": 3}, "moe_layers is of the wrong type"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types is not that of the model"),
        ({"attention_bias": True}, "has biases"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is not possible"),
        ({"num_experts_per_tok": 0}, "moe_router_topk is not possible"),
        ({"num_hidden_layers": -3}, "num_layers is not possible"),
    ],
)
def test_impossible_configurations(values: dict[str, Any], problem: str) -> None:
    checkpoint, _ = opened()
    with pytest.raises(MappingError, match=problem):
        changed(checkpoint, **values)


@pytest.mark.parametrize("kind", ["nemo2", "megatron-args"])
def test_several_experts_for_a_token(kind: str) -> None:
    model = changed(opened()[0], num_experts_per_tok=2)
    with pytest.raises(MappingError, match="only where there is one for each token"):
        models.render_config(model, kind)
    assert models.render_config(model, "hf")["num_experts_per_tok"] == 2


def test_a_shared_expert_of_another_width() -> None:
    _, model = opened()
    wide = replace(model, config=replace(model.config, moe_shared_expert_intermediate_size=96))
    with pytest.raises(MappingError, match="shared expert as wide"):
        models.render_config(wide, "hf")


def test_what_is_said_of_what_cannot_be() -> None:
    _, model = opened()
    said: dict[str, str] = {}
    for kind in ("hf", "nemo2", "megatron-args"):
        notes: list[str] = []
        models.render_config(model, kind, notes=notes)
        said[kind] = " ".join(notes)
    assert not said["hf"]
    assert "NeMo attends in chunks in all layers" in said["nemo2"]
    assert "beyond 8 tokens the model differs" in said["megatron-args"]
    assert "beyond 8192 tokens the model differs" in said["nemo2"]
    assert "normalise queries and keys in all layers" in said["megatron-args"]
    assert "no fields for attn_temperature_tuning" not in said["nemo2"]
    notes = []
    models.render_config(changed(opened()[0], attn_scale=0.5), "nemo2", notes=notes)
    assert any("no fields for attn_temperature_tuning" in note for note in notes)
