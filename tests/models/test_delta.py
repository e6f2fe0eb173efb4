"""Models with gated delta nets: rows as Megatron orders them, layers of further tokens, sections, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples, values
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read
from anyckpt.models.dialects.mamba_sections import joined_mixers, separate_mixers
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import LazyTensor, from_array

NAMES = ("qwen3-next", "qwen3.5", "qwen3.5-moe")
HEADS, GROUPS, WIDTH = 4, 2, 16
KEYS, VALUES, KEY_WIDTH, VALUE_WIDTH = 2, 4, 8, 4


def arrays(tensors: Mapping[str, LazyTensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_gated_query_key_and_value_of_a_group(name: str) -> None:
    checkpoint, model = samples()[name].open()
    own, hub = arrays(checkpoint.tensors), arrays(models.to_hub(checkpoint, model).tensors)
    query = own["model.layers.3.self_attn.q_proj.weight"].reshape(GROUPS, HEADS // GROUPS, 2, WIDTH, -1)
    key, value = (own[f"model.layers.3.self_attn.{which}_proj.weight"].reshape(GROUPS, WIDTH, -1) for which in "kv")
    expected = [
        part for group in range(GROUPS) for part in (*query[group, :, 0], *query[group, :, 1], key[group], value[group])
    ]
    assert np.array_equal(hub["decoder.layers.3.self_attention.linear_qkv.weight"], np.concatenate(expected))


def test_rows_of_a_net_that_are_stored_by_head() -> None:
    checkpoint, model = samples()["qwen3-next"].open()
    own, hub = arrays(checkpoint.tensors), arrays(models.to_hub(checkpoint, model).tensors)
    each = VALUES // KEYS * VALUE_WIDTH
    by_head = own["model.layers.0.linear_attn.in_proj_qkvz.weight"].reshape(KEYS, 2 * KEY_WIDTH + 2 * each, -1)
    both = own["model.layers.0.linear_attn.in_proj_ba.weight"].reshape(KEYS, 2 * VALUES // KEYS, -1)
    ends = np.cumsum([KEY_WIDTH, KEY_WIDTH, each])
    kinds = [*np.split(by_head, ends, axis=1), *np.split(both, 2, axis=1)]
    expected = np.concatenate([kind.reshape(-1, kind.shape[-1]) for kind in kinds])
    assert np.array_equal(hub["decoder.layers.0.self_attention.in_proj.weight"], expected)


def test_rows_of_a_net_that_are_stored_by_kind() -> None:
    checkpoint, model = samples()["qwen3.5"].open()
    own, hub = arrays(checkpoint.tensors), arrays(models.to_hub(checkpoint, model).tensors)
    parts = [own[f"model.layers.0.linear_attn.in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a")]
    assert np.array_equal(hub["decoder.layers.0.self_attention.in_proj.weight"], np.concatenate(parts))
    norm = own["model.layers.0.linear_attn.norm.weight"]
    assert np.array_equal(hub["decoder.layers.0.self_attention.out_norm.weight"], norm - 1)


def test_what_rounding_may_change_is_said() -> None:
    checkpoint, model = samples()["qwen3.5"].open()
    assert any("out_norm.weight: Megatron's values are Hugging Face's less 1" in note
               for note in models.to_hub(checkpoint, model).notes)  # fmt: skip


# -- further tokens --------------------------------------------------------------------------------------------

OUTSIDE = {
    "mtp.fc.weight": (32, 64), "mtp.norm.weight": (32,), "mtp.pre_fc_norm_embedding.weight": (32,),
    "mtp.pre_fc_norm_hidden.weight": (32,),
}  # fmt: skip
ATTENTION = {
    "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,), "self_attn.q_norm.weight": (16,),
    "self_attn.k_norm.weight": (16,), "self_attn.q_proj.weight": (128, 32), "self_attn.k_proj.weight": (32, 32),
    "self_attn.v_proj.weight": (32, 32), "self_attn.o_proj.weight": (32, 64),
}  # fmt: skip
DENSE = {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)}
SHARED = {
    "mlp.gate.weight": (4, 32), "mlp.shared_expert_gate.weight": (1, 32),
    "mlp.shared_expert.gate_proj.weight": (24, 32), "mlp.shared_expert.up_proj.weight": (24, 32),
    "mlp.shared_expert.down_proj.weight": (32, 24),
}  # fmt: skip
EACH = {
    f"mlp.experts.{expert}.{name}.weight": shape
    for expert in range(4)
    for name, shape in {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}.items()
}
TOGETHER = {"mlp.experts.gate_up_proj": (4, 40, 32), "mlp.experts.down_proj": (4, 32, 20)}
MEGATRON = "mtp.layers.0.transformer_layer"


def predicting(name: str, experts: Mapping[str, tuple[int, ...]] = EACH, said: bool = True) -> Checkpoint:
    """A sample with a layer of further tokens, as Qwen publishes them; transformers ignores it."""
    checkpoint, _ = samples()[name].open()
    inside = {**ATTENTION, **(DENSE if name == "qwen3.5" else {**SHARED, **experts})}
    shapes = {**OUTSIDE, **{f"mtp.layers.0.{key}": shape for key, shape in inside.items()}}
    more = {key: values(key, shape) for key, shape in shapes.items()}
    config = {**checkpoint.config, **({"mtp_num_hidden_layers": 1} if said else {})}
    return replace(checkpoint, tensors={**checkpoint.tensors, **more}, config=config)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("target", ["megatron-core", "megatron-bridge", "megatron-lm"])
@pytest.mark.parametrize("name", NAMES)
def test_further_tokens_there_and_back(name: str, target: str, said: bool, tmp_path: Path) -> None:
    source = predicting(name, said=said)
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "there", to=target)
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(source.tensors)
    assert after.config["mtp_num_hidden_layers"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_names_of_further_tokens(name: str) -> None:
    """Megatron-Bridge 0.6.2's, but for the layer's own name, which Megatron-Core changed since 0.16."""
    source = predicting(name)
    model = models.identify(source)
    assert model is not None
    found = {key for key in models.to_hub(source, model).tensors if key.startswith("mtp.")}
    expected = {f"mtp.layers.0.{key}.weight" for key in ("eh_proj", "enorm", "hnorm", "final_layernorm")} | {
        f"{MEGATRON}.self_attention.{key}"
        for key in ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight", "q_layernorm.weight",
                    "k_layernorm.weight")
    }  # fmt: skip
    if name == "qwen3.5":
        expected |= {f"{MEGATRON}.mlp.linear_{k}" for k in ("fc1.layer_norm_weight", "fc1.weight", "fc2.weight")}
    else:
        expected |= {f"{MEGATRON}.pre_mlp_layernorm.weight", f"{MEGATRON}.mlp.router.weight"}
        expected |= {f"{MEGATRON}.mlp.experts.linear_{fc}.weight{e}" for fc in ("fc1", "fc2") for e in range(4)}
        shared = ("linear_fc1.weight", "linear_fc2.weight", "gate_weight")
        expected |= {f"{MEGATRON}.mlp.shared_experts.{key}" for key in shared}
    assert found == expected


def test_stacked_experts_of_further_tokens() -> None:
    """As Qwen3.6 is published."""
    source = predicting("qwen3.5-moe", TOGETHER)
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(source, model)
    gate_up = source.tensors["mtp.layers.0.mlp.experts.gate_up_proj"].numpy()
    for expert in range(4):
        found = hub.tensors[f"{MEGATRON}.mlp.experts.linear_fc1.weight{expert}"].numpy()
        assert np.array_equal(found, gate_up[expert])


def test_a_layer_of_further_tokens_that_is_not_there() -> None:
    checkpoint, _ = samples()["qwen3.5"].open()
    model = models.identify(replace(checkpoint, config={**checkpoint.config, "mtp_num_hidden_layers": 1}))
    assert model is not None
    assert model.config.mtp_num_layers is None
    assert any("multi-token prediction are not in the checkpoint" in note for note in model.notes)


def test_the_whole_as_it_is_published(tmp_path: Path) -> None:
    """Qwen3.5 also sees; the layer of further tokens is beside its text part, as its head is."""
    text = predicting("qwen3.5")
    named = {
        f"model.language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key: tensor
        for key, tensor in text.tensors.items()
    }
    named["model.visual.pos_embed.weight"] = values("pos_embed", (4, 8))
    inside = {**{key: value for key, value in text.config.items() if key != "architectures"}, "dtype": "float32"}
    config = {
        "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": inside,
        "tie_word_embeddings": False, "vision_config": {"num_heads": 2},
    }  # fmt: skip
    source = replace(text, tensors=named, config=config)
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "there", to="megatron-core")
    there = read(str(tmp_path / "there"))
    assert "language_model.mtp.layers.0.eh_proj.weight" in there.tensors
    assert "vision_model.pos_embed.weight" in there.tensors
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(source.tensors)
    assert after.config == source.config


# -- layouts and configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_sections_there_and_back(name: str) -> None:
    checkpoint, model = samples()[name].open()
    hub = models.to_hub(checkpoint, model).tensors
    apart = separate_mixers(hub)
    assert apart["decoder.layers.0.self_attention.in_proj.weight.beta"].shape == (VALUES, 32)
    assert facts(joined_mixers(apart)) == facts(hub)
    del apart["decoder.layers.0.self_attention.conv1d.weight.key"]
    with pytest.raises(MappingError, match="a section of a mixer's projection is missing"):
        joined_mixers(apart)


def test_sections_that_do_not_follow() -> None:
    checkpoint, model = samples()["qwen3.5"].open()
    hub = models.to_hub(checkpoint, model).tensors
    key = "decoder.layers.0.self_attention.A_log"
    with pytest.raises(MappingError, match="do not follow from the shapes"):
        separate_mixers({**hub, key: from_array(np.zeros(40, "<f4"))})


def test_a_rank_has_its_share_of_each_kind_of_row(tmp_path: Path) -> None:
    checkpoint, _ = samples()["qwen3.5"].open()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "there", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    shard = next(shard for shard in read(str(tmp_path / "there")).ranks if shard.tensor_rank == 1)
    own = arrays(checkpoint.tensors)
    query, key, value = np.split(own["model.layers.0.linear_attn.in_proj_qkv.weight"], [16, 32])
    kinds = [query, key, value, *(own[f"model.layers.0.linear_attn.in_proj_{which}.weight"] for which in "zba")]
    expected = np.concatenate([kind[len(kind) // 2 :] for kind in kinds])
    assert np.array_equal(shard.tensors["decoder.layers.0.self_attention.in_proj.weight"].numpy(), expected)
    with pytest.raises(MappingError, match="heads of gated delta nets cannot be spread"):
        anyckpt.convert(path, tmp_path / "four", to="megatron-lm", layout=LayoutRequest(tensor_parallel=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "layer_types is not that of the model"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is not that of the model"),
        ({"layer_types": "full"}, "layer_types is not that of the model"),
        ({"linear_num_value_heads": 3}, "do not divide among"),
        ({"linear_conv_kernel_dim": -1}, "linear_conv_kernel_dim"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    checkpoint, _ = samples()["qwen3.5"].open()
    with pytest.raises(MappingError, match=message):
        models.identify(replace(checkpoint, config={**checkpoint.config, **change}))


@pytest.mark.parametrize("value", [None, 0, "4", [1, 2, 0, 0], [1]])
def test_impossible_arguments(value: Any) -> None:
    checkpoint, model = samples()["qwen3.5"].open()
    arguments = {**models.render_config(model, "megatron-args"), "linear_attention_freq": value}
    hub = with_weights(checkpoint, models.to_hub(checkpoint, model).tensors, "hub")
    with pytest.raises(MappingError, match="linear_attention_freq"):
        models.identify(replace(hub, config=arguments, config_kind="megatron-args"))


def test_megatrons_number_for_the_layers() -> None:
    checkpoint, model = samples()["qwen3.5"].open()
    arguments = {**models.render_config(model, "megatron-args"), "linear_attention_freq": 4}
    hub = with_weights(checkpoint, models.to_hub(checkpoint, model).tensors, "hub")
    again = models.identify(replace(hub, config=arguments, config_kind="megatron-args"))
    assert again is not None
    assert again.config.linear_attention_freq == model.config.linear_attention_freq == (1, 1, 1, 0)
    assert models.render_config(model, "hf")["full_attention_interval"] == 4
