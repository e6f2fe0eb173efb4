"""Decoders as Megatron-Core's HybridModel, whose layers are attention or MLP, and as GPTModel; both ways."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.proofs import samples
from tests.models.test_mtp import checkpoint as with_further_predictions
from tests.support import expected_of, fixture_path, write_plan

import anyckpt
from anyckpt import models
from anyckpt.cli import run
from anyckpt.config import megatron as config_megatron
from anyckpt.config.hybrid import gpt_arguments, hybrid_arguments, letters_of
from anyckpt.config.megatron_bridge_providers import provider_of
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.layout.from_config import geometry_of
from anyckpt.models import render_config
from anyckpt.models.dialects.hybrid import as_blocks, as_halves, block_name, half_name, in_halves
from anyckpt.models.dialects.spellings import from_hub_names, to_hub_names
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import from_array

FAMILIES = {
    "llama": "*-*-",
    "llama_tied_bf16": "*-*-",
    "gpt2": "*-*-",
    "qwen2": "*-*-",
    "qwen3": "*-*-",
    "mixtral": "*E*E",
    "deepseek_v3": "+-+E+E",
    "deepseek_v2_lite": "+-+E",
    "qwen3_moe": "*E*E",
    "mistral_swa": "*-*-",
    "phi3": "*-*-",
    "nemotron": "*-*-",
    "gpt_neox": "*-*-",
    "starcoder2": "*-*-",
    "gemma": "*-*-",
    "falcon_seq_mqa": "*-*-",
    "qwen2_moe": "*E*E",
    "gpt_oss": "*E*E",
}
LAYOUTS: dict[str, LayoutRequest] = {
    "megatron-core": LayoutRequest(megatron_model="hybrid"),
    "megatron-core-zarr": LayoutRequest(megatron_model="hybrid"),
    "megatron-lm": LayoutRequest(megatron_model="hybrid", pipeline_parallel=4),
}
OPTIMIZERS = ["mcore/gpt_opt_fully_reshardable_dp2", "mcore/gpt_opt_plain", "mcore/gpt_moe_opt_chained_ep2"]


def hub(family: str) -> Path:
    return fixture_path(f"families/{family}/hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(family: str, tmp_path: Path) -> None:
    anyckpt.convert(hub(family), tmp_path / "hybrid", to="megatron-core", layout=LayoutRequest(megatron_model="hybrid"))
    found = registry.read(tmp_path / "hybrid")
    assert re.sub("(..)+", r"\1", found.config["hybrid_layer_pattern"]) in FAMILIES[family]
    assert found.config["num_layers"] == len(found.config["hybrid_layer_pattern"])
    layers = {int(match[1]) for name in found.tensors if (match := re.match(r"decoder\.layers\.(\d+)\.", name))}
    assert layers == set(range(found.config["num_layers"])) and "decoder.final_norm.weight" in found.tensors
    assert not anyckpt.diff(hub(family), tmp_path / "hybrid")
    for to, layout in (("hf", None), ("megatron-core", LayoutRequest(megatron_model="gpt"))):
        anyckpt.convert(tmp_path / "hybrid", tmp_path / to, to=to, layout=layout)
        assert not anyckpt.diff(hub(family), tmp_path / to)
    anyckpt.convert(hub(family), tmp_path / "direct", to="megatron-core")
    back, direct = registry.read(tmp_path / "megatron-core"), registry.read(tmp_path / "direct")
    assert list(back.tensors) == list(direct.tensors)
    assert {key: back.config.get(key) or None for key in direct.config} == {
        key: value or None for key, value in direct.config.items()
    }


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layout(family: str, to: str, tmp_path: Path) -> None:
    """A pipeline stage may end between the halves of a block."""
    anyckpt.convert(hub(family), tmp_path / "hybrid", to=to, layout=LAYOUTS[to])
    assert letters_of(registry.read(tmp_path / "hybrid").config) is not None
    assert not anyckpt.diff(hub(family), tmp_path / "hybrid")
    for other in ("megatron-core", "megatron-lm"):  # which model it is stays, unless another is asked for
        anyckpt.convert(tmp_path / "hybrid", tmp_path / other, to=other)
        assert letters_of(registry.read(tmp_path / other).config) is not None
        assert not anyckpt.diff(hub(family), tmp_path / other)
    anyckpt.convert(tmp_path / "megatron-lm", tmp_path / "gpt", to=to, layout=LayoutRequest(megatron_model="gpt"))
    assert letters_of(registry.read(tmp_path / "gpt").config) is None
    assert not anyckpt.diff(hub(family), tmp_path / "gpt")


@pytest.mark.parametrize(
    ("layout", "letters"),
    [
        ({"pipeline_parallel": 2}, "*-|*-"),
        ({"pipeline_parallel": 2, "first_stage_layers": 1, "last_stage_layers": 3}, "*|-*-"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, "*|-|*|-"),
        ({"pipeline_parallel": 2, "pipeline_layout": "Ettt|tL"}, "*-*|-"),
        ({"tensor_parallel": 2}, "*-*-"),
    ],
)
def test_letters_say_what_each_stage_has(layout: dict[str, Any], letters: str, tmp_path: Path) -> None:
    """HybridModel takes its stages from them, and has no other way to say virtual ones."""
    request = LayoutRequest(megatron_model="hybrid", **layout)
    anyckpt.convert(hub("llama"), tmp_path / "a", to="megatron-lm", layout=request)
    found = registry.read(tmp_path / "a")
    assert found.config["hybrid_layer_pattern"] == letters
    assert not anyckpt.diff(hub("llama"), tmp_path / "a")
    again = LayoutRequest(pipeline_parallel=4, megatron_model="hybrid")
    anyckpt.convert(tmp_path / "a", tmp_path / "b", to="megatron-lm", layout=again)
    assert registry.read(tmp_path / "b").config["hybrid_layer_pattern"] == "*|-|*|-"
    assert not anyckpt.diff(hub("llama"), tmp_path / "b")
    anyckpt.convert(tmp_path / "b", tmp_path / "c", to="megatron-lm", layout=LayoutRequest(pipeline_parallel=1))
    assert registry.read(tmp_path / "c").config["hybrid_layer_pattern"] == "*-*-"


@pytest.mark.parametrize("name", samples())
def test_every_model_is_written_so_or_refused(name: str) -> None:
    """Whatever is not the same model in halves is refused, and what is comes back with the same names and arguments."""
    checkpoint, model = samples()[name].open()
    try:
        arguments = render_config(model, "megatron-args")
        halves = hybrid_arguments(arguments, [])
        hub_tensors = models.to_hub(checkpoint, model)
        named = models.from_hub(hub_tensors, "megatron-core", in_halves=True).tensors
    except MappingError as error:
        assert re.search("HybridModel|hybrid one already|Megatron-Core has no", str(error)), str(error)
        return
    assert in_halves(to_hub_names(named, in_blocks=False)[0])
    assert to_hub_names(named)[0].keys() == models.from_hub(hub_tensors, "hub").tensors.keys()
    first, second = config_megatron.parse(arguments), config_megatron.parse(gpt_arguments(halves))
    assert replace(first, extra={}) == replace(second, extra={})


def test_megatron_bridge(tmp_path: Path) -> None:
    anyckpt.convert(hub("mixtral"), tmp_path / "b", to="megatron-bridge", layout=LayoutRequest(megatron_model="hybrid"))
    found = registry.read(tmp_path / "b")
    model = found.details["run_config"]["model"]
    assert model["_target_"].endswith(".HybridModelProvider") and model["hybrid_layer_pattern"] == "*E*E"
    assert not anyckpt.diff(hub("mixtral"), tmp_path / "b")
    for family in ("deepseek_v3", "gemma", "ministral3"):
        with pytest.raises(MappingError, match="class of HybridModel has no"):
            provider_of(hybrid_arguments(render_config(samples()[family].open()[1], "megatron-args"), []))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_optimizers_state_goes_with_its_weights(case: str, tmp_path: Path) -> None:
    source = fixture_path(f"{case}/ckpt")
    for path, name, model in ((source, "hybrid", "hybrid"), (tmp_path / "hybrid", "gpt", "gpt")):
        layout = LayoutRequest(megatron_model=model, transformer_impl="local")
        anyckpt.convert(path, tmp_path / name, to="megatron-core", optimizer="keep", layout=layout)
    there, back = open_checkpoint(tmp_path / "hybrid"), open_checkpoint(tmp_path / "gpt")
    moments = [name for name in there.tensors if name.startswith("optimizer.state.exp_avg.decoder.layers.")]
    assert moments and all(name.removeprefix("optimizer.state.exp_avg.") in there.tensors for name in moments)
    assert back.training.step == there.training.step == open_checkpoint(source).training.step
    for path in (tmp_path / "hybrid", tmp_path / "gpt"):
        found = anyckpt.diff(source, path)
        assert not (found.different or found.only_in_a or found.only_in_b)
        # of several optimizers one is made, whose groups are theirs
        assert all(setting.name.startswith("optimizer.") for setting in found.state)
        assert found.compared >= len(open_checkpoint(source).tensors) - 1


@pytest.mark.parametrize("case", ["current_hybrid_dense", "current_hybrid_moe"])
def test_what_megatron_core_saved(case: str, tmp_path: Path) -> None:
    """The tensors of a HybridModel that the newest release saved are those of the GPTModel, two layers each."""
    source = fixture_path(f"mcore/{case}/ckpt")
    anyckpt.convert(source, tmp_path / "gpt", to="megatron-lm", layout=LayoutRequest(megatron_model="gpt"))
    found, stored = open_checkpoint(tmp_path / "gpt"), expected_of(f"mcore/{case}")["tensors"]
    assert found.config["num_layers"] == 2 and "hybrid_layer_pattern" not in found.config
    assert any(name.startswith("decoder.layers.1.self_attention.") for name in found.tensors)
    assert not any(name.startswith("decoder.layers.2.") for name in found.tensors)
    assert len(stored) <= len(found.tensors) and "decoder.final_layernorm.weight" in found.tensors
    difference = anyckpt.diff(source, tmp_path / "gpt")
    assert not (difference.different or difference.only_in_a or difference.only_in_b)


def test_a_model_of_no_known_family(tmp_path: Path) -> None:
    """Names and arguments change together; without arguments nothing tells what there is."""
    source = fixture_path("mcore/current_gpt_moe/ckpt")
    anyckpt.convert(source, tmp_path / "h", to="megatron-core", layout=LayoutRequest(megatron_model="hybrid"))
    found = registry.read(tmp_path / "h")
    assert found.config["hybrid_layer_pattern"] == "*-*E" and in_halves(found.tensors)
    difference = anyckpt.diff(source, tmp_path / "h")
    assert difference.compared and not (difference.different or difference.only_in_a or difference.only_in_b)
    anyckpt.convert(tmp_path / "h", tmp_path / "weights", to="safetensors")
    with pytest.raises(AnyckptError):
        anyckpt.convert(
            tmp_path / "weights", tmp_path / "x", to="megatron-core", layout=LayoutRequest(megatron_model="gpt")
        )


@pytest.mark.parametrize(
    ("family", "to", "message"),
    [
        ("llama31_ropescale", "megatron-core", "does not scale rope"),
        ("nemotron_h", "megatron-core", "is a hybrid one already"),
        ("gemma3", "megatron-core", "post_layernorm.*has no such tensor"),
        ("t5_v1_1", "megatron-core", "has no such tensor"),
        ("llama", "nemo2", "means nothing for nemo2.*others get the blocks"),
        ("llama", "hf", "means nothing for hf"),
    ],
)
def test_what_no_hybrid_model_is(family: str, to: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((MappingError, UsageError), match=message):
        anyckpt.convert(hub(family), tmp_path / "x", to=to, layout=LayoutRequest(megatron_model="hybrid"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["gemma2", "exaone4", "olmoe", "minimax-m2"])
def test_layers_that_the_stock_stack_has_not_are_refused(name: str) -> None:
    """Norms behind attention and MLP, or of all heads together, are Megatron-Bridge's: a load would leave them out."""
    checkpoint, model = samples()[name].open()
    with pytest.raises(MappingError, match="HybridModel"):
        hybrid_arguments(render_config(model, "megatron-args"), [])
        models.from_hub(models.to_hub(checkpoint, model), "megatron-core", in_halves=True)


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("qwen3-next", "GEGEGE*E"),
        ("qwen3-next-dense-layers", "*EG-GE*E"),
        ("qwen3.5", "G-G-G-*-"),
        ("qwen3.5-moe", "GEGEGE*E"),
    ],
)
def test_gated_delta_nets_are_letters(name: str, letters: str) -> None:
    checkpoint, model = samples()[name].open()
    notes: list[str] = []
    arguments = hybrid_arguments(render_config(model, "megatron-args"), notes)
    assert arguments["hybrid_layer_pattern"] == letters
    assert any("no norms of queries and keys" in note for note in notes)
    named = models.from_hub(models.to_hub(checkpoint, model), "megatron-core", in_halves=True).tensors
    nets = {2 * layer for layer, letter in enumerate(letters[::2]) if letter == "G"}
    found = {int(key.split(".")[2]) for key in named if key.endswith(".self_attention.A_log")}
    assert found == nets
    plain = {key: value for key, value in arguments.items() if "linear_attention" not in key and "variant" not in key}
    again = models.identify(replace(checkpoint, tensors=named, dialect=None, config=plain, config_kind="megatron-args"))
    assert again is not None
    assert again.config.linear_attention_freq == model.config.linear_attention_freq
    assert again.family in (model.family, "qwen3-next")


def test_arguments_that_it_has_not_are_refused() -> None:
    for key, value, why in (
        ("parallel_residual", True, "one behind the other"),
        ("rotary_base_local", 5e3, "one base"),
        ("experimental_attention_variant", "another", "no rules yet"),
        ("mtp_num_layers", "1", "not possible"),
    ):
        with pytest.raises(MappingError, match=why):
            hybrid_arguments({"num_layers": 2, key: value}, [])


def test_attention_beside_the_mlp_is_refused() -> None:
    """Its names fit, and what it computes would be another's."""
    for name in ("falcon-7b", "falcon-40b", "falcon-11b", "pythia"):
        model = samples()[name].open()[1]
        with pytest.raises(MappingError, match="not side by side"):
            hybrid_arguments(render_config(model, "megatron-args"), [])


def test_a_model_without_the_scaling_of_rope_is_written(tmp_path: Path) -> None:
    """Which the user then scales: the error says so."""
    source = hub("llama31_ropescale")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    layout = LayoutRequest(megatron_model="hybrid")
    with pytest.raises(MappingError, match="with --config of a configuration without the scaling"):
        anyckpt.convert(source, tmp_path / "x", to="megatron-core", layout=layout)
    anyckpt.convert(source, tmp_path / "x", to="megatron-core", layout=layout, config=config)
    found = anyckpt.diff(source, tmp_path / "x")
    assert found.compared and not (found.different or found.only_in_a or found.only_in_b)


@pytest.mark.parametrize("to", ["megatron-core", "megatron-core-zarr", "megatron-lm"])
def test_multi_token_prediction(to: str, tmp_path: Path) -> None:
    """Its block is a stack of two layers, like the last block's; on two ranks of two stages, too."""
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(with_further_predictions(), WriteOptions()), tmp_path / "source")
    sizes = {"tensor_parallel": 2, "pipeline_parallel": 2} if to == "megatron-lm" else {}
    anyckpt.convert(source, tmp_path / "hybrid", to=to, layout=LayoutRequest(megatron_model="hybrid", **sizes))
    found = open_checkpoint(tmp_path / "hybrid")
    assert found.config["hybrid_layer_pattern"].replace("|", "") == "+-+E/+E" and found.config["mtp_num_layers"] == 1
    stack = "mtp.layers.0.mtp_model_layer.layers"
    names = [name[name.index("mtp.") :] for name in found.tensors if "mtp." in name]
    assert {f"{stack}.0.input_layernorm.weight", f"{stack}.1.pre_mlp_layernorm.weight"} < set(names)
    assert not any(".transformer_layer." in name for name in names) and "mtp.layers.0.eh_proj.weight" in names
    for target, layout in (("hf", None), ("megatron-core", LayoutRequest(megatron_model="gpt"))):
        anyckpt.convert(tmp_path / "hybrid", tmp_path / target, to=target, layout=layout)
        assert not anyckpt.diff(source, tmp_path / target)
    back = registry.read(tmp_path / "megatron-core")
    assert back.config["mtp_num_layers"] == 1 and "hybrid_layer_pattern" not in back.config
    assert "mtp.layers.0.transformer_layer.input_layernorm.weight" in back.tensors


def test_letters_of_further_predictions() -> None:
    """A GPTModel makes their blocks like its last; a HybridModel of other ones is none in halves."""
    for pattern, letters in (("*-*E/*E", "*-*E"), ("*-*E/*-", None), ("*-/*", None), ("*-/", "*-")):
        assert letters_of({"hybrid_layer_pattern": pattern}) == letters
    assert gpt_arguments({"hybrid_layer_pattern": "*-|*E/*E/*E", "num_layers": 4})["mtp_num_layers"] == 2
    names = ["decoder.final_norm.weight"]
    names += [f"decoder.layers.{layer}.{part}.weight" for layer, part in ((0, "self_attention"), (1, "mlp"))]
    step = "mtp.layers.0.transformer_layer.layers"
    assert in_halves([*names, f"{step}.0.self_attention.x", f"{step}.1.mlp.x"])
    for other in (f"{step}.0.mlp.x", f"{step}.2.self_attention.x", f"{step}.0.mixer.x"):
        assert not in_halves([*names, other])


def test_a_stack_of_further_predictions_keeps_its_name() -> None:
    """What HybridModel asks for; a GPTModel's block is called as older releases call it."""
    stored = {
        f"mtp.layers.0.transformer_layer.{rest}.weight": from_array(np.ones(1, np.float32))
        for rest in ("layers.0.mixer.out_proj", "self_attention.linear_proj")
    }
    assert list(from_hub_names(stored, "megatron-core")) == [
        "mtp.layers.0.mtp_model_layer.layers.0.mixer.out_proj.weight",
        "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight",
    ]


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
def test_attention_that_an_indexer_chooses_for(name: str, tmp_path: Path) -> None:
    """Norms are modules of their own in every HybridModel and in a GPTModel of 0.19, and fused before."""
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(samples()[name].open()[0], WriteOptions()), tmp_path / "source")
    for model, release, own in (("hybrid", None, True), ("gpt", None, False), ("gpt", "0.19", True)):
        out = tmp_path / f"{model}-{release}"
        layout = LayoutRequest(megatron_model=model, megatron_version=release)
        anyckpt.convert(source, out, to="megatron-core", layout=layout)
        found = registry.read(out)
        assert (letters_of(found.config) or "D-DEDEDE") == "D-DEDEDE" and found.config["multi_latent_attention"]
        assert ("decoder.layers.0.self_attention.q_layernorm.weight" in found.tensors) is own
        assert ("decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight" in found.tensors) is not own
        assert not anyckpt.diff(source, out)
        anyckpt.convert(out, tmp_path / f"{out.name}-hf", to="hf")
        assert not anyckpt.diff(source, tmp_path / f"{out.name}-hf")


def test_ranks_of_a_model_without_mambas_layers() -> None:
    """The heads that mixers would have by default decide nothing."""
    arguments = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "is_hybrid_model": True}
    for pattern, mixers in (("*-", False), ("M-", True)):
        found = config_megatron.sizes({**arguments, "hybrid_layer_pattern": pattern})
        assert (geometry_of(found).mamba is not None) is mixers


def test_a_model_of_hybrid_layers_keeps_them(tmp_path: Path) -> None:
    """One whose family's layers are attention or MLP, even if none of them is Mamba's."""
    model = samples()["nemotron_h"].open()[1]
    arguments = render_config(model, "megatron-args")
    assert letters_of(arguments) is None
    assert letters_of({"hybrid_layer_pattern": "*-|*-"}) == "*-*-"


def test_norms_that_the_stock_layers_lack_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["convert", str(hub("qwen3")), str(tmp_path / "x"), "--to", "megatron-core", "--megatron-model", "hybrid"]
    assert run(command) == 0
    assert "no norms of queries and keys" in capsys.readouterr().err


def test_extra_states_go_with_their_modules(tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_dense_tp2pp2/ckpt")
    layout = LayoutRequest(megatron_model="hybrid", keep_extra_state=True)
    anyckpt.convert(source, tmp_path / "h", to="megatron-core", layout=layout)
    names = registry.read(tmp_path / "h").ignored
    assert "decoder.layers.0.self_attention.linear_qkv._extra_state" in names
    assert "decoder.layers.3.mlp.linear_fc2._extra_state" in names and "output_layer._extra_state" in names


def test_the_output_layer_of_every_hybrid_asks_for_a_state(tmp_path: Path) -> None:
    """MambaModel of 0.16 and HybridModel of 0.19 do; only GPTModel takes the key out."""
    for family, model in (("nemotron_h", None), ("llama_tied_bf16", "hybrid"), ("llama", None)):
        anyckpt.convert(hub(family), tmp_path / family, to="megatron-core", layout=LayoutRequest(megatron_model=model))
        asked = "output_layer._extra_state" in registry.read(tmp_path / family).ignored
        assert asked is (family != "llama")


@given(
    st.integers(1, 12).flatmap(
        lambda layers: st.fixed_dictionaries(
            {
                "num_layers": st.just(layers),
                "num_experts": st.sampled_from([None, 4]),
                "moe_layer_freq": st.one_of(
                    st.integers(1, layers), st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
                ),
                "window_attn_skip_freq": st.one_of(st.none(), st.integers(1, 5)),
                "no_rope_freq": st.one_of(st.none(), st.integers(1, 5)),
                "multi_latent_attention": st.booleans(),
                "num_layers_in_first_pipeline_stage": st.sampled_from([None, 1]),
            }
        )
    )
)
def test_arguments_there_and_back(arguments: dict[str, Any]) -> None:
    """What is said of single layers is said of the same ones, whatever their numbers are."""
    there = hybrid_arguments(arguments, [])
    assert hybrid_arguments(there, []) == there
    layers = arguments["num_layers"]
    back = gpt_arguments(there)
    assert back["num_layers"] == layers and back.get("num_layers_in_first_pipeline_stage") in (None, 1)
    every = arguments["window_attn_skip_freq"]
    if every is not None:
        assert there["window_attn_skip_freq"][::2] == [int((layer + 1) % every != 0) for layer in range(layers)]
        assert back["window_attn_skip_freq"] == (every if every <= layers else [1] * layers)
    if arguments["num_experts"]:
        frequency = arguments["moe_layer_freq"]
        wanted = frequency if isinstance(frequency, list) else [int(n % frequency == 0) for n in range(layers)]
        assert [int(letter == "E") for letter in there["hybrid_layer_pattern"][1::2]] == wanted
        if any(wanted):
            assert back["moe_layer_freq"] == (1 if all(wanted) else wanted)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40),
            st.sampled_from(
                [
                    "self_attention.linear_qkv.weight",
                    "mlp.router.weight",
                    "input_layernorm.bias",
                    "pre_mlp_layernorm.weight",
                    "mlp.experts.linear_fc1.weight7",
                ]
            ),
        ),
        unique=True,
    )
)
def test_names_there_and_back(parts: list[tuple[int, str]]) -> None:
    names = [f"decoder.layers.{layer}.{rest}" for layer, rest in parts]
    names += ["decoder.final_layernorm.weight", "embedding.word_embeddings.weight", "output_layer.weight"]
    halves = as_halves(dict.fromkeys(names, 0))
    assert list(as_blocks(halves)) == names and len(halves) == len(names)
    assert [block_name(half_name(name)) for name in names] == names


def test_adapters_are_of_the_base_models_layers(tmp_path: Path) -> None:
    """An adapter names some modules of some layers, which does not tell the models apart: its configuration does."""
    peft = fixture_path("families/lora_llama/hf_adapter")
    with pytest.raises(UsageError, match="leave --megatron-model out"):
        anyckpt.convert(
            peft,
            tmp_path / "x",
            to="megatron-core",
            config=registry.read(hub("llama")).config,
            layout=LayoutRequest(megatron_model="hybrid"),
        )
    anyckpt.convert(peft, tmp_path / "core", to="megatron-core", config=registry.read(hub("llama")).config)
    found = registry.read(tmp_path / "core")
    halves = replace(found, config=hybrid_arguments({"num_layers": 2, **found.config}, []), config_kind="megatron-args")
    with pytest.raises(MappingError, match="adapter of Megatron-Core's HybridModel"):
        anyckpt.convert(halves, tmp_path / "y", to="peft")


@pytest.mark.parametrize("to", ["nemo2", "nemo"])
def test_containers_without_such_a_model_get_its_blocks(to: str, tmp_path: Path) -> None:
    """NeMo's classes of Megatron-Core's older releases have a GPTModel for it."""
    anyckpt.convert(hub("llama"), tmp_path / "h", to="megatron-core", layout=LayoutRequest(megatron_model="hybrid"))
    anyckpt.convert(tmp_path / "h", tmp_path / to, to=to)
    assert not any("final_norm" in name for name in open_checkpoint(tmp_path / to).tensors)
    found = anyckpt.diff(hub("llama"), tmp_path / to)
    assert found.compared and not (found.different or found.only_in_a or found.only_in_b)
