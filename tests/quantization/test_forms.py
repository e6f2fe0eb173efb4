"""Folders of quantized weights: what is in them, what their configurations say, and that they are read back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.places import Log, MemoryPlace, far, files_below, registered
from tests.quantization.quantized import write_folder
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.hf import FORMAT as HF
from anyckpt.quantization.choosing import choose_linear
from anyckpt.quantization.forms import ALGORITHMS, FORMS
from anyckpt.tensor import from_array

SOURCE = "quant/src_llama_a/hf"
GROUP = {"int4": 32}
PAIRS = [
    (form, algorithm)
    for form in HF.quantizes
    for algorithm in FORMS[form]
    if form != "mxfp4" and not FORMS[form][algorithm].smoothing
]


UNREAD = ("fp8_blocks", "int8", "nvfp4")


def convert(source: Any, out: Path, algorithm: str, form: str | None = None, **options: Any) -> Any:
    options.setdefault("group_size", GROUP.get(algorithm))
    return anyckpt.convert(source, out, to="hf", quantize=algorithm, quantize_form=form, **options)


def config_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return facts


@pytest.mark.parametrize(("form", "algorithm"), PAIRS)
def test_what_is_written_is_accounted_for(form: str, algorithm: str, tmp_path: Path) -> None:
    source = fixture_path(SOURCE)
    done = convert(source, tmp_path / "q", algorithm, form)
    stored, plain = anyckpt.open(tmp_path / "q").weights(), anyckpt.open(source).weights()
    linear = {name for name in plain if name.endswith("_proj.weight")}
    assert len(linear) == 14
    for name in plain.keys() - linear:
        np.testing.assert_array_equal(stored[name].numpy(), plain[name].numpy())
    stems = {name.removesuffix("weight") for name in linear}
    assert all(any(name.startswith(stem) for stem in stems) for name in stored.keys() - plain.keys())
    assert sum(done.casts.values()) == 14
    assert any("14 weights are quantized" in note and "lm_head (the output layer)" in note for note in done.notes)
    facts = config_of(tmp_path / "q")
    assert facts.get("ignore", facts.get("modules_to_not_convert")) == ["lm_head"]
    assert (tmp_path / "q" / "hf_quant_config.json").exists() == (form == "modelopt")
    assert not done.ignored
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "q"))
    assert after < 0.65 * before


def test_nvfp4_is_modelopts_folder(tmp_path: Path) -> None:
    theirs = fixture_path("quant/nvfp4_b/hf")
    convert(fixture_path("quant/src_llama_b/hf"), tmp_path / "q", "nvfp4", "modelopt", dtype="fp32")
    ours, expected = (anyckpt.open(folder).weights() for folder in (tmp_path / "q", theirs))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        same = ours[name].numpy().tobytes() == tensor.numpy().tobytes()
        assert same != name.endswith(".input_scale"), name
    assert config_of(tmp_path / "q") == config_of(theirs)
    written, given = (json.loads((folder / "hf_quant_config.json").read_text()) for folder in (tmp_path / "q", theirs))
    assert written == given


@pytest.mark.parametrize(
    ("case", "algorithm"), [("fp8_bf16_a", "fp8"), ("fp8_pcpt_a", "fp8_per_channel"), ("int8_wo_a", "int8_wo")]
)
def test_configurations_are_modelopts(case: str, algorithm: str, tmp_path: Path) -> None:
    files = json.loads((fixture_path("quant") / case / "expected.json").read_text())["variants"]["hf"]["files"]
    convert(
        fixture_path(SOURCE), tmp_path / "q", algorithm, "modelopt", activation_scale=0.5
    ) if algorithm == "fp8" else (convert(fixture_path(SOURCE), tmp_path / "q", algorithm, "modelopt"))
    facts = files["config.json"]
    assert config_of(tmp_path / "q") == facts["quantization_config"]
    assert json.loads((tmp_path / "q" / "hf_quant_config.json").read_text()) == files["hf_quant_config.json"]
    stored = anyckpt.open(tmp_path / "q").weights()
    expected = files["model.safetensors"]
    expected = expected.get("tensors", expected)
    assert stored.keys() == expected.keys()
    for name, fact in expected.items():
        assert list(stored[name].shape) == fact["shape"], name
    if algorithm == "fp8":
        assert {float(t.numpy()) for name, t in stored.items() if name.endswith("input_scale")} == {0.5}


def test_experts_of_gpt_oss_become_mxfp4(tmp_path: Path) -> None:
    source = fixture_path("families/gpt_oss/hf")
    plain = anyckpt.open(source)
    wide = {
        name: from_array(np.random.default_rng(0).standard_normal((4, 64, n)).astype(np.float32))
        for name, n in (("experts.gate_up_proj", 128), ("experts.down_proj", 64))
    }
    layers = {f"model.layers.{i}.mlp.{name}": tensor for i in range(2) for name, tensor in wide.items()}
    model = Checkpoint(str(source), "hf", {**plain.weights(), **layers}, config={"model_type": "x"}, config_kind="hf")
    done = convert(model, tmp_path / "q", "mxfp4", "mxfp4")
    stored = anyckpt.open(tmp_path / "q").weights()
    assert stored["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 128, 2, 16)
    assert stored["model.layers.0.mlp.experts.gate_up_proj_scales"].shape == (4, 128, 2)
    assert done.casts == {"float32 -> mxfp4": 4}
    assert "model.layers.0.mlp.router" in config_of(tmp_path / "q")["modules_to_not_convert"]
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="safetensors", dtype="fp32")
    back = anyckpt.open(tmp_path / "back").weights()
    for name, tensor in layers.items():
        difference = back[name].numpy() - tensor.numpy()
        assert back[name].shape == tensor.shape
        assert np.sqrt((difference**2).mean()) < 0.13


def test_activations_are_scaled_as_asked(tmp_path: Path) -> None:
    convert(fixture_path(SOURCE), tmp_path / "q", "fp8", "compressed-tensors", activation_scale=0.25)
    inputs = config_of(tmp_path / "q")["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)
    scales = [t for name, t in anyckpt.open(tmp_path / "q").weights().items() if name.endswith(".input_scale")]
    assert [float(scale.numpy()[0]) for scale in scales] == [0.25] * 14
    done = convert(fixture_path(SOURCE), tmp_path / "m", "fp8", "modelopt")
    assert any("input_scale is 1 everywhere" in note for note in done.notes)


def test_activations_have_scales_of_their_own(tmp_path: Path) -> None:
    """From JSON, and from a quantized model of the same names, such as the one that a finetuned model began as."""
    source = fixture_path(SOURCE)
    modules = [name.removesuffix(".weight") for name in anyckpt.open(source).weights() if name.endswith("_proj.weight")]
    scales = {module: 2.0**-number for number, module in enumerate(modules)}
    (tmp_path / "s.json").write_text(json.dumps({**scales, "lm_head": 3}))
    done = convert(source, tmp_path / "q", "fp8", "modelopt", activation_scales=tmp_path / "s.json")
    stored = anyckpt.open(tmp_path / "q").weights()
    assert {module: float(stored[f"{module}.input_scale"].numpy()) for module in modules} == scales
    assert any("1 scales of activations are of modules that are not quantized: lm_head" in note for note in done.notes)
    assert not any("is 1 everywhere" in note for note in done.notes)
    convert(source, tmp_path / "again", "fp8", "modelopt", activation_scales=tmp_path / "q")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "q")
    few = {modules[0]: 0.5}
    with pytest.raises(UsageError, match=rf"{modules[1]}.*no scale is given.*among the 1 of --activation-scales"):
        convert(source, tmp_path / "no", "fp8", "compressed-tensors", activation_scales=few)
    convert(source, tmp_path / "rest", "fp8", "compressed-tensors", activation_scales=few, activation_scale=0.25)
    stored = anyckpt.open(tmp_path / "rest").weights()
    found = [float(stored[f"{module}.input_scale"].numpy()[0]) for module in modules]
    assert found == [0.5, *[0.25] * (len(modules) - 1)]


@pytest.mark.parametrize("given", [{}, {"a": "b"}, {"a": True}, {"a": None}])
def test_scales_that_are_none(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(given))
    for scales in (given, tmp_path / "s.json", fixture_path(SOURCE)):
        with pytest.raises(UsageError, match="has no scales of activations"):
            convert(fixture_path(SOURCE), tmp_path / "q", "fp8", "modelopt", activation_scales=scales)


def test_modules_are_left_as_asked(tmp_path: Path) -> None:
    exclude = ["*.down_proj", "model.layers.1.*"]
    done = convert(fixture_path(SOURCE), tmp_path / "q", "int8", quantize_exclude=exclude)
    assert done.casts == {"bfloat16 -> int8": 6}
    ignored = config_of(tmp_path / "q")["ignore"]
    assert len(ignored) == 9
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"} < set(ignored)
    assert any("and 5 more (--quantize-exclude)" in note for note in done.notes)


def test_routers_stay_and_experts_do_not(tmp_path: Path) -> None:
    convert(fixture_path("families/qwen3_moe/hf"), tmp_path / "q", "fp8_per_channel")
    stored = anyckpt.open(tmp_path / "q").weights()
    gates = [name for name in stored if ".mlp.gate.weight" in name]
    assert gates
    assert all(stored[name].dtype.itemsize > 1 for name in gates)
    assert any(t.dtype == "float8_e4m3fn" for name, t in stored.items() if ".experts." in name)
    assert {name.removesuffix(".weight") for name in gates} < set(config_of(tmp_path / "q")["ignore"])


@pytest.mark.parametrize("algorithm", FORMS["compressed-tensors"])
def test_experts_that_transformers_does_not_read_are_told(algorithm: str, tmp_path: Path) -> None:
    """Which these are, the peer test of the same name finds out."""
    told = []
    for module in ("mlp.experts.0.down_proj", "mlp.down_proj"):
        weight = np.ones((32, 32), np.float32)
        source = write_folder(tmp_path / module, {"model_type": "mine"}, {f"model.layers.0.{module}.weight": weight})
        notes = convert(source, tmp_path / f"{module}.q", algorithm, "compressed-tensors").notes
        told.append(any("1 of them are experts, which vLLM loads so" in note for note in notes))
    assert told == [algorithm in UNREAD, False]


@pytest.mark.parametrize(
    ("family", "count", "left"),
    [
        ("nemotron_h", None, {"mixer.gate", "mixer.conv1d", "lm_head"}),
        ("mixtral", None, {"block_sparse_moe.gate", "lm_head"}),
        ("qwen2_moe", None, {"mlp.gate", "mlp.shared_expert_gate", "lm_head"}),
        ("gpt_neox", 4, {"embed_out", "gpt_neox.embed_in"}),
        ("falcon_seq_mqa", 4, {"lm_head", "transformer.word_embeddings"}),
        ("phi3", 4, {"lm_head", "model.embed_tokens"}),
        ("t5_v1_1", None, {"SelfAttention.relative_attention_bias", "shared"}),
        ("starcoder2", 6, {"model.embed_tokens"}),
    ],
)
def test_what_is_linear(family: str, count: int | None, left: set[str]) -> None:
    """Every matrix in the layers but routers, gates and embeddings; of what is outside, none."""
    tensors = anyckpt.open(fixture_path(f"families/{family}/hf")).weights()
    choice = choose_linear(tensors)
    found = {re.sub(r".*?\.\d+\.", "", name) for name in choice.weights}
    assert count is None or len(found) == count
    for ending in left:
        assert any(module.endswith(ending) for module in choice.spared), ending
        assert not any(name.endswith(f"{ending}.weight") for name in choice.weights), ending
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2 and name.endswith(".weight")}
    assert matrices == {*choice.weights} | ({f"{module}.weight" for module in choice.spared} & matrices)


def test_output_layers_have_many_names(tmp_path: Path) -> None:
    convert(fixture_path("families/gpt_neox/hf"), tmp_path / "q", "int8")
    assert "embed_out" in config_of(tmp_path / "q")["ignore"]
    assert "gpt_neox.embed_in" not in config_of(tmp_path / "q")["ignore"]


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, r"unknown algorithm.*expected fp8, .*int4.*found int3"),
        ({"quantize": "fp8", "quantize_form": "gguf"}, r"unknown form.*compressed-tensors, modelopt, fp8, mxfp4"),
        (
            {"quantize": "int4", "quantize_form": "modelopt"},
            r"modelopt has no int4.*--quantize-form: compressed-tensors",
        ),
        ({"quantize": "int4"}, r"down_proj.*multiple of 128 columns, found 192 columns.*--group-size"),
        ({"quantize": "int8", "activation_scale": 1.0}, "stores no scales of activations"),
        ({"quantize": "fp8", "quantize_form": "modelopt", "activation_scale": 0.0}, "positive number"),
        ({"quantize": "fp8", "activation_scale": -1.0}, "positive number"),
        ({"quantize": "fp8", "activation_scales": {"a": float("nan")}}, "positive number"),
        ({"activation_scales": {"a": 1.0}}, "--activation-scales means nothing without --quantize"),
        ({"quantize": "int8", "optimizer": "keep"}, "training state goes with weights in full precision"),
        ({"quantize_form": "modelopt"}, "--quantize-form means nothing without --quantize"),
        ({"group_size": 64}, "--group-size means nothing without --quantize"),
        ({"quantize": "int8", "group_size": 64}, "--group-size means nothing with --quantize int8"),
        ({"quantize": "int4_wo"}, r"hf does not hold int4_wo.*expected fp8, .*found int4_wo.*with --to"),
        ({"quantize": "int4", "quantize_form": "modelopt"}, r"--quantize-form: compressed-tensors$"),
        ({"quantize": "fp8", "quantize_exclude": "*"}, r"no weight can be quantized.*--quantize-exclude"),
        ({"quantize": "mxfp4", "quantize_form": "mxfp4"}, r"no weight can be quantized.*stacked experts"),
    ],
)
def test_what_is_not_possible(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", **options)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("algorithm", ["fp8_per_channel", "int4_wo"])
def test_a_group_size_that_nothing_has(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--group-size means nothing with --quantize {algorithm}"):
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="trtllm", quantize=algorithm, group_size=64)


def test_an_algorithm_that_a_format_has_in_no_form(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trtllm does not hold mxfp4.*expected fp8, .*with --to$"):
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="trtllm", quantize="mxfp4")


@pytest.mark.parametrize(
    ("algorithm", "to", "example"),
    [
        ("int8", "hf", r"model\.layers\.0\.mlp\.down_proj"),
        ("fp8_per_channel", "trtllm", r"transformer\.layers\.0\."),
        ("int8_wo", "trtllm", r"transformer\.layers\.0\."),
    ],
)
def test_a_module_to_leave_that_there_is_not_is_told(algorithm: str, to: str, example: str, tmp_path: Path) -> None:
    exclude = ["*.2.down_project", "*layers.0.*"]
    source = fixture_path(SOURCE)
    done = anyckpt.convert(source, tmp_path / "q", to=to, quantize=algorithm, quantize_exclude=exclude, dry_run=True)
    (note,) = (note for note in done.notes if "matches no module" in note)
    assert re.match(rf"--quantize-exclude '\*\.2\.down_project' .*named as {example.replace('0', '1')}", note)


def test_other_formats_hold_no_quantized_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not written as nemo.*--to hf"):
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="nemo", quantize="fp8")


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    source = fixture_path("quant/nvfp4_b/hf")
    with pytest.raises(UsageError, match=r"quantized already \(modelopt NVFP4\).*--dtype bf16"):
        convert(source, tmp_path / "q", "int8")
    convert(source, tmp_path / "q", "int8", dtype="bf16")
    assert config_of(tmp_path / "q")["format"] == "int-quantized"
    assert not (tmp_path / "q" / "hf_quant_config.json").exists()


def test_models_with_outputs_in_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gpt2 have their outputs in columns"):
        convert(fixture_path("families/gpt2/hf"), tmp_path / "q", "int8")


def test_every_algorithm_has_a_form() -> None:
    assert set(ALGORITHMS) == {
        "int8_sq",
        "int4_awq",
        "w4a8_awq",
        "fp8",
        "fp8_per_channel",
        "fp8_blocks",
        "int8",
        "int8_wo",
        "int4",
        "int4_wo",
        "nvfp4",
        "mxfp4",
    }


# -- the same bytes, whoever writes them and wherever they are read --------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize("algorithm", ["fp8", "fp8_blocks", "int8_wo", "int4", "nvfp4"])
def test_threads_shares_and_distance_change_nothing(algorithm: str, tmp_path: Path) -> None:
    source = fixture_path(SOURCE)
    options: dict[str, Any] = {"max_shard_size": 60_000}
    convert(source, tmp_path / "one", algorithm, workers=1, **options)
    convert(source, tmp_path / "four", algorithm, workers=4, **options)
    for number in (1, 2, 3):
        done = convert(source, tmp_path / "shares", algorithm, share=f"{number}/3", **options)
        assert bool(done.missing_shares) == (number < 3)
    with registered("far", MemoryPlace("far://model", files_below(source), far(Log()))):
        convert("far://model", tmp_path / "far", algorithm, **options)
    expected = bytes_of(tmp_path / "one")
    assert len(expected) > 5
    for name in ("four", "shares", "far"):
        assert bytes_of(tmp_path / name) == expected, name


def test_what_is_no_number_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    shutil.copytree(fixture_path(SOURCE), tmp_path / "in")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = anyckpt.open(tmp_path / "in").weights()[name].region()
    assert tensor is not None
    with (tmp_path / "in" / "model.safetensors").open("r+b") as file:
        file.seek(tensor.offset + 2000)
        file.write(b"\xc0\x7f")
    for algorithm in ("fp8", "int8", "nvfp4"):
        with pytest.raises(
            FormatError,
            match=rf"^tensor '{name}': the weight holds infinite values or not-a-numbers.*--quantize-exclude",
        ):
            convert(tmp_path / "in", tmp_path / "q", algorithm)
        assert not (tmp_path / "q").exists()
        convert(tmp_path / "in", tmp_path / algorithm, algorithm, quantize_exclude="*.layers.1.mlp.up_proj")


@pytest.mark.parametrize(("family", "algorithm"), [("llama", "fp8_blocks"), ("qwen3_moe", "fp8"), ("gemma2", "int8")])
def test_from_megatron_as_from_the_hub(family: str, algorithm: str, tmp_path: Path) -> None:
    """Fused and interleaved weights are quantized apart, as the modules of the target have them."""
    anyckpt.convert(fixture_path(f"families/{family}/hf"), tmp_path / "megatron", to="megatron-core")
    anyckpt.convert(tmp_path / "megatron", tmp_path / "hub", to="hf")
    convert(tmp_path / "megatron", tmp_path / "one", algorithm)
    convert(tmp_path / "hub", tmp_path / "two", algorithm)
    assert bytes_of(tmp_path / "one")["model.safetensors"] == bytes_of(tmp_path / "two")["model.safetensors"]
