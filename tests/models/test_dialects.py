"""Megatron's spellings of the hub's names."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
from tests.models.cases import FAMILIES, MEGATRON_DIALECTS, facts, open_case, with_weights
from tests.support import fixture_path

from anyckpt import models
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.megatron_core import FORMAT as MEGATRON_CORE
from anyckpt.formats.nemo import FORMAT as NEMO
from anyckpt.formats.registry import look_at
from anyckpt.models.dialects import spellings
from anyckpt.tensor import LazyTensor, from_array


def tensor(*shape: int, start: int = 0) -> LazyTensor:
    return from_array(np.arange(start, start + int(np.prod(shape)), dtype="<f4").reshape(shape))


def renamed(tensors: Mapping[str, LazyTensor], *changes: tuple[str, str]) -> dict[str, LazyTensor]:
    result = {}
    for name, value in tensors.items():
        for old, new in changes:
            name = name.replace(old, new)
        result[name] = value
    return result


LOCAL = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)


@pytest.mark.parametrize("dialect", MEGATRON_DIALECTS)
def test_detected_from_names(dialect: str) -> None:
    case = open_case("llama")
    named = models.from_hub(case.hub(), dialect).tensors
    assert spellings.detect(named) == dialect
    assert spellings.detect(case.checkpoint.tensors) == "hf"


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.layers.0.self_attn.linear_q.weight", "decoder.decoder_layers.0.weight"],
        ["embed_tokens.weight", "perception.weight"],
        ["decoder.weight"],
        [],
    ],
)
def test_other_models_have_no_dialect(names: list[str]) -> None:
    assert spellings.detect(names) is None


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module.", "module.module."])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_wrappers_and_local_norm_names(name: str, local: bool, prefix: str) -> None:
    case = open_case(name)
    stored = renamed(case.megatron, *LOCAL) if local else dict(case.megatron)
    wrapped = {prefix + key: value for key, value in stored.items()}
    wrapped[f"{prefix}decoder.layers.0.self_attention.linear_qkv._extra_state"] = tensor(3)
    wrapped[f"{prefix}rotary_pos_emb.inv_freq"] = tensor(3)
    hub = models.to_hub(with_weights(case.checkpoint, wrapped), case.padded())
    assert facts(hub.tensors) == facts(case.megatron)
    assert len(hub.ignored) == 2


def test_halves_saved_apart() -> None:
    case = open_case("llama")
    split = {}
    for name, value in case.megatron.items():
        if name.endswith("linear_fc1.weight"):
            half = value.shape[0] // 2
            split[f"{name}_v"] = value.narrow(0, half, half)
            split[f"{name}_w"] = value.narrow(0, 0, half)
        else:
            split[name] = value
    hub = models.to_hub(with_weights(case.checkpoint, split), case.padded())
    assert facts(hub.tensors) == facts(case.megatron)
    for both in (split | dict(case.megatron), dict(case.megatron) | split):
        with pytest.raises(MappingError, match="the same one of the model"):
            models.to_hub(with_weights(case.checkpoint, both), case.padded())
    del split["decoder.layers.1.mlp.linear_fc1.weight_w"]
    with pytest.raises(MappingError, match=r"linear_fc1.weight_v': the other half"):
        models.to_hub(with_weights(case.checkpoint, split), case.padded())


def test_norm_before_experts_keeps_its_name_in_either_spelling() -> None:
    """A local-spec mixture-of-experts layer is saved under the fused norm's name although nothing is fused."""
    layer = "decoder.layers.0."
    attention = {f"{layer}self_attention.linear_qkv.weight": tensor(4, 2)}
    experts = {f"{layer}mlp.router.weight": tensor(4, 2)}
    for spelled in ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"):
        named, _ = spellings.to_hub_names({**attention, **experts, layer + spelled: tensor(2)})
        assert f"{layer}pre_mlp_layernorm.weight" in named
    latent = {f"{layer}self_attention.linear_q_proj.weight": tensor(4, 2), f"{layer}input_layernorm.weight": tensor(2)}
    assert f"{layer}input_layernorm.weight" in spellings.to_hub_names(latent)[0]


def test_biases_of_norms() -> None:
    layer = "decoder.layers.0."
    stored = {f"{layer}mlp.linear_fc1.weight": tensor(4, 2), f"{layer}pre_mlp_layernorm.bias": tensor(2)}
    assert f"{layer}mlp.linear_fc1.layer_norm_bias" in spellings.to_hub_names(stored)[0]


def test_layers_that_differ_are_not_stacked() -> None:
    layers = {
        "decoder.layers.0.mlp.linear_fc1.weight": tensor(4, 2),
        "decoder.layers.1.mlp.linear_fc1.weight": tensor(6, 2),
        "decoder.final_layernorm.weight": tensor(2),
    }
    assert set(spellings.from_hub_names(layers, "nemo-sharded")) == {f"model.{name}" for name in layers}
    missing = {"decoder.layers.1.mlp.linear_fc1.weight": tensor(4, 2)}
    assert set(spellings.from_hub_names(missing, "megatron-core")) == set(missing)


def test_stacking_puts_layers_in_numerical_order() -> None:
    layers = {f"decoder.layers.{i}.mlp.linear_fc2.weight": tensor(2, 2, start=100 * i) for i in range(11, -1, -1)}
    (stacked,) = spellings.from_hub_names(layers, "megatron-core").values()
    assert [int(row) for row in stacked.numpy()[:, 0, 0]] == [100 * i for i in range(12)]


def test_the_same_tensor_twice() -> None:
    twice = {
        "decoder.layers.0.mlp.linear_fc1.weight": tensor(4, 2),
        "decoder.layers.mlp.linear_fc1.weight": tensor(1, 4, 2),
    }
    with pytest.raises(MappingError, match="the same one of the model"):
        spellings.to_hub_names(twice)
    experts = {
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": tensor(4, 2),
        "decoder.layers.0.mlp.experts.experts.linear_fc1.weight": tensor(1, 4, 2),
    }
    with pytest.raises(MappingError, match="the same one of the model"):
        spellings.to_hub_names(experts)
    norms = {
        "decoder.layers.0.mlp.linear_fc1.weight": tensor(4, 2),
        "decoder.layers.0.pre_mlp_layernorm.weight": tensor(2),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": tensor(2),
    }
    with pytest.raises(MappingError, match="the same one of the model"):
        spellings.to_hub_names(norms)


def test_a_layer_axis_of_absurd_length() -> None:
    with pytest.raises(MappingError, match="too many layers"):
        spellings.to_hub_names({"decoder.layers.mlp.linear_fc2.weight": tensor(10_001, 1)})


def test_renaming_a_model_of_no_known_family() -> None:
    stored = {
        "model.embedding.word_embeddings.weight": tensor(4, 2),
        "model.decoder.layers.0.mlp.linear_fc2.weight": tensor(2, 2),
        "model.decoder.layers.1.mlp.linear_fc2.weight": tensor(2, 2, start=4),
        "model.decoder.layers.0.mlp.linear_fc2._extra_state": tensor(1),
    }
    named, ignored = spellings.rename(stored, "nemo-flat", "nemo2")
    assert {name: t.shape for name, t in named.items()} == {
        "module.embedding.word_embeddings.weight": (4, 2),
        "module.decoder.layers.mlp.linear_fc2.weight": (2, 2, 2),
    }
    assert list(ignored) == ["model.decoder.layers.0.mlp.linear_fc2._extra_state"]
    back, _ = spellings.rename(named, "nemo2", "nemo-flat")
    assert facts(back) == facts({name: stored[name] for name in stored if name not in ignored})
    assert spellings.rename(stored, "nemo-flat", "nemo-flat") == (stored, {})
    with pytest.raises(UsageError, match="unknown dialect"):
        spellings.rename(stored, "nemo-flat", "hf")


@pytest.mark.parametrize("name", ["gpt_moe_ep2_seq_shared", "gpt_moe_firstdense_tp2_ep2"])
def test_experts_that_megatron_core_stacked(name: str) -> None:
    """With and without a layer axis: one tensor per expert in the hub, and the same checkpoint from there."""
    checkpoint = MEGATRON_CORE.read(look_at(fixture_path(f"mcore/{name}/ckpt")))
    hub, ignored = spellings.to_hub_names(checkpoint.weights())
    layer = 1 if "firstdense" in name else 0
    assert ignored == {}
    assert sum(f"layers.{layer}.mlp.experts.linear_fc1.weight" in key for key in hub) == 4
    assert f"decoder.layers.{layer}.pre_mlp_layernorm.weight" in hub
    again = renamed(
        spellings.from_hub_names(hub, "megatron-core"),
        ("layers.pre_mlp_layernorm.weight", "layers.mlp.linear_fc1.layer_norm_weight"),
        ("layers.1.pre_mlp_layernorm.weight", "layers.1.mlp.linear_fc1.layer_norm_weight"),
    )
    assert facts(again) == facts(checkpoint.weights())


def test_experts_as_modules_and_alone() -> None:
    layer = "decoder.layers.0.mlp.experts."
    modules = {f"{layer}local_experts.{e}.linear_fc1.weight": tensor(4, 2, start=e) for e in range(3)}
    alone = {f"{layer}experts.{e}.linear_fc1.weight_{half}": tensor(2, 2, start=e) for e in range(3) for half in "wv"}
    for stored in (modules, alone):
        hub, _ = spellings.to_hub_names(stored)
        assert set(hub) == {f"{layer}linear_fc1.weight{e}" for e in range(3)}
        ((name, stacked),) = spellings.from_hub_names(hub, "megatron-core").items()
        assert name == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
        assert stacked.shape == (1, 3, 4, 2)
        assert list(stacked.numpy()[0, :, 0, 0]) == [0, 1, 2]
    del hub[f"{layer}linear_fc1.weight1"]
    with pytest.raises(MappingError, match="expert 1 is missing"):
        spellings.from_hub_names(hub, "megatron-core")


MEGATRON_ARGS = {
    "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 4, "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 32,
}  # fmt: skip


def test_a_checkpoint_that_megatron_core_wrote() -> None:
    checkpoint = MEGATRON_CORE.read(look_at(fixture_path("mcore/gpt_dense_tp2pp2/ckpt")))
    assert models.identify(checkpoint) is None, "its arguments are a stub"
    model = models.identify(checkpoint, config=MEGATRON_ARGS)
    assert model is not None
    assert model.family == "llama"
    hub = models.to_hub(checkpoint, model)
    expected = json.loads((fixture_path("mcore/gpt_dense_tp2pp2") / "expected.json").read_text())["tensors"]
    again = facts(models.from_hub(hub, "megatron-core").tensors)
    assert {name: list(fact) for name, fact in again.items()} == {
        name: [fact["dtype"], tuple(fact["shape"]), fact["sha256"]] for name, fact in expected.items()
    }
    exported = models.from_hub(hub, "hf").tensors
    assert exported["model.layers.1.self_attn.k_proj.weight"].shape == (8, 16)


@pytest.mark.parametrize("name", ["nemo1_dist_tp1", "nemo1_dist_tp2"])
def test_an_archive_that_nemo_wrote(name: str) -> None:
    checkpoint = NEMO.read(look_at(fixture_path(f"nemo/{name}/model.nemo")))
    model = models.identify(checkpoint)
    assert model is not None
    assert (model.family, model.config.kv_channels, model.config.eos_token_id) == ("llama", 4, 2)
    hub = models.to_hub(checkpoint, model)
    stored = facts(checkpoint.weights())
    assert facts(models.from_hub(hub, "nemo-sharded").tensors) == stored
