"""Mamba-2 as state-spaces and NVIDIA have stored it, and where NeMo's and Megatron's classes differ from the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, open_case, with_weights
from tests.models.proofs import samples
from tests.support import write_plan

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import read
from anyckpt.formats.torch import FORMAT as TORCH
from anyckpt.operations.convert import convert
from anyckpt.tensor import LazyTensor, from_array

CONFIG: dict[str, Any] = {
    "d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61, "attn_layer_idx": [], "attn_cfg": {},
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
"""With the keys that the ``config.json`` of state-spaces/mamba2-130m has."""

HEADS, INNER, STATES = 8, 64, 16
SHAPES = {
    "backbone.embedding.weight": (64, 32),
    **{
        f"backbone.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "mixer.dt_bias": (HEADS,),
            "mixer.A_log": (HEADS,),
            "mixer.D": (HEADS,),
            "mixer.in_proj.weight": (2 * INNER + 2 * STATES + HEADS, 32),
            "mixer.conv1d.weight": (INNER + 2 * STATES, 1, 4),
            "mixer.conv1d.bias": (INNER + 2 * STATES,),
            "mixer.norm.weight": (INNER,),
            "mixer.out_proj.weight": (32, INNER),
            "norm.weight": (32,),
        }.items()
    },
    "backbone.norm_f.weight": (32,),
    "lm_head.weight": (64, 32),
}
"""As ``MambaLMHeadModel`` of mamba_ssm 2 names them."""


def state_spaces(**changes: Any) -> Checkpoint:
    random = np.random.default_rng(0)
    tensors: dict[str, LazyTensor] = {
        name: from_array(random.standard_normal(shape).astype("<f4")) for name, shape in SHAPES.items()
    }
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return Checkpoint("x", "hf", tensors, dialect="hf", config={**CONFIG, **changes}, config_kind="hf")


def identified(checkpoint: Checkpoint) -> models.Model:
    model = models.identify(checkpoint)
    assert model is not None
    return model


def test_what_state_spaces_stores(tmp_path: Path) -> None:
    source = state_spaces()
    assert TORCH.plan is not None
    file = write_plan(TORCH.plan(replace(source, config={}, config_kind=None), WriteOptions()), tmp_path / "x.pt")
    folder = tmp_path / "mamba2"
    folder.mkdir()
    file.rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    opened = read(str(folder))
    model = identified(opened)
    assert model.family == "mamba2"
    config = model.config
    assert (config.vocab_size, config.padded_vocab_size, config.make_vocab_size_divisible_by) == (61, 64, 16)
    assert config.hybrid_override_pattern == "MM"
    assert config.mamba_num_groups == 1
    assert config.share_embeddings_and_output_weights
    hub = models.to_hub(opened, model)
    assert hub.ignored == {"lm_head.weight": "tied to backbone.embeddings.weight"}
    named = {
        name.replace("embedding.weight", "embeddings.weight"): tensor
        for name, tensor in source.tensors.items()
        if name != "lm_head.weight"
    }
    named["backbone.embeddings.weight"] = named["backbone.embeddings.weight"].narrow(0, 0, 61)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(named)
    convert(str(folder), tmp_path / "hf", to="hf")
    rendered = json.loads((tmp_path / "hf/config.json").read_text())
    assert rendered["model_type"] == "mamba2"
    assert rendered["vocab_size"] == 61
    assert not rendered.keys() & CONFIG.keys() - {"residual_in_fp32", "vocab_size"}
    convert(str(folder), tmp_path / "megatron", to="megatron-core")
    again = read(str(tmp_path / "megatron"))
    assert again.weights()["embedding.word_embeddings.weight"].shape == (64, 32), "padded as it was"
    back = models.to_hub(again, identified(again))
    assert facts(back.tensors) == facts(hub.tensors)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"rms_norm": False}, "rms_norm"),
        ({"d_conv": 3}, "d_conv"),
        ({"norm_before_gate": True}, "norm_before_gate"),
        ({"headdim": 24}, "expand does not fit its heads"),
        ({"expand": "2"}, "wrong type"),
        ({"n_layer": 0}, "num_layers is not possible"),
        ({"d_model": "x"}, "wrong type"),
        ({"pad_vocab_size_multiple": -4}, "not possible"),
        ({"d_state": 0}, "not possible"),
    ],
)
def test_other_models_of_state_spaces_code(changes: dict[str, Any], problem: str) -> None:
    outer = {key: value for key, value in changes.items() if key in CONFIG}
    mixer = {key: value for key, value in changes.items() if key not in CONFIG}
    with pytest.raises(MappingError, match=problem):
        models.identify(state_spaces(ssm_cfg={**CONFIG["ssm_cfg"], **mixer}, **outer))


@pytest.mark.parametrize("mixer", [None, {}, "Mamba2", {"layer": "Mamba1"}])
def test_mamba_1_is_not_it(mixer: Any) -> None:
    assert models.identify(state_spaces(ssm_cfg=mixer)) is None


def test_state_spaces_configuration_given_by_hand() -> None:
    bare = replace(state_spaces(), config={}, config_kind=None)
    model = models.identify(bare, config=CONFIG)
    assert model == identified(state_spaces())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"conv_kernel": 3}, "conv_kernel"),
        ({"use_bias": True}, "use_bias"),
        ({"use_conv_bias": False}, "use_conv_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ({"time_step_limit": "x"}, "time_step_limit"),
        ({"expand": 3}, "expand does not fit"),
        ({"num_heads": 0}, "expand does not fit"),
        ({"num_hidden_layers": -1}, "num_layers is not possible"),
        ({"num_hidden_layers": 10**9}, "too many layers"),
    ],
)
def test_what_megatron_core_has_no_mixers_for(changes: dict[str, Any], problem: str) -> None:
    checkpoint = samples()["mamba2"].open()[0]
    with pytest.raises(MappingError, match=problem):
        models.identify(replace(checkpoint, config={**checkpoint.config, **changes}))


@pytest.mark.parametrize(
    "limit", [[0.0, float("inf")], (0, float("inf")), [0.0, "Infinity"], [0.0, {"__float__": "Infinity"}]]
)
def test_steps_without_limits(limit: Any) -> None:
    checkpoint = samples()["mamba2"].open()[0]
    assert identified(replace(checkpoint, config={**checkpoint.config, "time_step_limit": limit}))


def test_nvidias_older_names() -> None:
    """nvidia/mamba2-8b-3t-4k has a norm of its own before each mixer."""
    checkpoint, model = samples()["mamba2"].open()
    hub = models.to_hub(checkpoint, model)
    older = {
        name.replace(".mixer.in_proj.layer_norm_weight", ".norm.weight"): tensor for name, tensor in hub.tensors.items()
    }
    assert older.keys() != hub.tensors.keys()
    again = models.to_hub(with_weights(checkpoint, older), model)
    assert facts(again.tensors) == facts(hub.tensors)


# -- NeMo ----------------------------------------------------------------------------------------------------


def tied() -> tuple[Checkpoint, models.Model]:
    checkpoint, _ = samples()["mamba2"].open()
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "lm_head.weight"}
    source = replace(checkpoint, tensors=rest, config={**checkpoint.config, "tie_word_embeddings": True})
    return source, identified(source)


@pytest.mark.parametrize(("dialect", "kind"), [("nemo-flat", "nemo1"), ("nemo-sharded", "nemo1"), ("nemo2", "nemo2")])
def test_nemos_classes_tie_nothing(dialect: str, kind: str) -> None:
    source, model = tied()
    named = models.from_hub(models.to_hub(source, model), dialect)
    assert any("copy of the embedding" in note for note in named.notes)
    rendered = models.render_config(model, kind)
    between = replace(with_weights(source, named.tensors), config=rendered, config_kind=kind)
    again = identified(between)
    assert not again.config.share_embeddings_and_output_weights
    out = models.from_hub(models.to_hub(between, again), "hf").tensors
    assert facts({name: tensor for name, tensor in out.items() if name != "lm_head.weight"}) == facts(source.tensors)
    copies = facts({"x": out["lm_head.weight"]}), facts({"x": out["backbone.embeddings.weight"]})
    assert copies[0] == copies[1]


def test_megatron_core_ties() -> None:
    source, model = tied()
    assert "output_layer.weight" not in models.from_hub(models.to_hub(source, model), "megatron-core").tensors
    assert not models.render_config(model, "megatron-args")["untie_embeddings_and_output_weights"]


NEMO2 = "nemo.collections.llm.gpt.model.ssm"


@pytest.mark.parametrize(
    ("name", "family", "facts_of_it"),
    [
        ("BaseMambaConfig130M", "mamba2", {"num_layers": 24, "hidden_size": 768, "mamba_num_heads": 24}),
        ("BaseMambaConfig2_7B", "mamba2", {"num_layers": 64, "hidden_size": 2560, "mamba_num_groups": 1}),
        ("NVIDIAMambaConfig8B", "mamba2", {"num_layers": 56, "mamba_num_groups": 8, "mamba_num_heads": 128}),
        ("NVIDIAMambaHybridConfig8B", "nemotron-h", {"num_layers": 56, "activation": "gelu", "num_query_groups": 8}),
        ("NemotronHConfig56B", "nemotron-h", {"num_layers": 118, "activation": "squared_relu"}),
        ("Nemotron5HybridConfig47B", "nemotron-h", {"num_layers": 98, "mamba_state_dim": 256}),
    ],
)
def test_nemo_2_classes_with_nothing_said(name: str, family: str, facts_of_it: Mapping[str, Any]) -> None:
    config = {"_target_": f"{NEMO2}.MambaModel", "config": {"_target_": f"{NEMO2}.{name}"}}
    model = identified(Checkpoint("x", "nemo2", {}, config=config, config_kind="nemo2"))
    assert model.family == family
    assert {key: getattr(model.config, key) for key in facts_of_it} == facts_of_it
    assert not model.config.share_embeddings_and_output_weights


def test_nemo_2_class_has_no_vocabulary() -> None:
    _, model = samples()["mamba2"].open()
    rendered = models.render_config(model, "nemo2")["config"]
    assert rendered["_target_"] == f"{NEMO2}.SSMConfig"
    assert "vocab_size" not in rendered


def test_what_nemo_1_writes() -> None:
    """The keys of megatron_mamba_config.yaml, as its converter of state-spaces' models fills them in."""
    checkpoint, model = samples()["mamba2"].open()
    config = {
        "mcore_gpt": True, "encoder_seq_length": 4096, "max_position_embeddings": 4096, "num_layers": 3,
        "position_embedding_type": "none", "gated_linear_unit": False, "add_bias_linear": False, "num_query_groups": 8,
        "ngroups_mamba": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_size": 32, "ffn_hidden_size": 32,
        "num_attention_heads": 32, "kv_channels": None, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5,
        "num_moe_experts": 16, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.001, "make_vocab_size_divisible_by": 128,
        "vocab_size": 64, "hybrid_override_pattern": None, "mamba_head_dim": 8, "mamba_state_dim": 16,
        "target": "nemo.collections.nlp.models.language_modeling.megatron_mamba_model.MegatronMambaModel",
    }  # fmt: skip
    out = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    between = replace(with_weights(checkpoint, out), config=config, config_kind="nemo1")
    found = identified(between)
    assert found.family == "mamba2"
    assert found.config.num_moe_experts is None
    assert facts(models.from_hub(models.to_hub(between, found), "hf").tensors) == facts(checkpoint.tensors)
    del config["target"]
    assert models.identify(replace(between, config=config)) is None


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "megatron-args"])
def test_another_epsilon_is_said(kind: str) -> None:
    _, model = samples()["mamba2"].open()
    notes: list[str] = []
    models.render_config(model, kind, notes=notes)
    assert not any("epsilon" in note for note in notes)
    models.render_config(replace(model, config=replace(model.config, layernorm_epsilon=1e-6)), kind, notes=notes)
    assert any("epsilon of 1e-05" in note for note in notes)


def test_nvidias_hybrid_of_2024() -> None:
    """nvidia/mamba2-hybrid-8b-3t-128k: Nemotron-H's layers with GELU, and mixers' norms under their older name."""
    case = open_case("nemotron_h")
    pattern = case.model.config.hybrid_override_pattern
    assert pattern is not None
    arguments = {
        key: value
        for key, value in models.render_config(case.model, "megatron-args").items()
        if key not in ("hf_model_type", "squared_relu")
    }
    named = {
        name.replace(".mixer.in_proj.layer_norm_weight", ".norm.weight"): tensor
        for name, tensor in models.from_hub(case.hub(), "hub").tensors.items()
    }
    between = replace(with_weights(case.checkpoint, named), config=arguments, config_kind="megatron-args")
    model = identified(between)
    assert (model.family, model.config.activation) == ("nemotron-h", "gelu")
    hub = models.to_hub(between, model)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(case.checkpoint.tensors)
    rendered = models.render_config(model, "hf")
    assert (rendered["mlp_hidden_act"], rendered["hybrid_override_pattern"]) == ("gelu", pattern)


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "megatron-args"])
def test_a_configuration_that_lost_its_pattern(kind: str) -> None:
    """It is refused by names, for it says that no layer has a mixer."""
    checkpoint, model = samples()["mamba2"].open()
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    config = models.render_config(model, kind)
    (config["config"] if kind == "nemo2" else config)["hybrid_override_pattern"] = ""
    config.pop("target", None)
    between = replace(with_weights(checkpoint, named), config=config, config_kind=kind)
    with pytest.raises(MappingError, match="no rule of family mamba2 covers"):
        models.to_hub(between, identified(between))
