"""Adapters through every format that has them, and into their base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.manifest import read_manifest
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, MappingError, OutputError, UsageError
from anyckpt.operations.steps.common_names import common_names
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.tensor import LazyTensor, from_array

BASE = fixture_path("families/llama/hf")
ADAPTER = fixture_path("families/lora_llama/hf_adapter")
NEMO = fixture_path("legacy/nemo_lora_tp2_pp2/lora.nemo")
MEGATRON = ("nemo", "nemo2", "megatron-bridge", "megatron-core")


def convert(source: Path, to: str, path: Path, **options: Any) -> Checkpoint:
    anyckpt.convert(source, path, to=to, **options)
    return anyckpt.open(path)


def assert_equal(found: dict[str, LazyTensor], expected: dict[str, LazyTensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert np.array_equal(found[name].numpy(), tensor.numpy()), name


# -- converting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"layout": LayoutRequest(2)},
                                     {"layout": LayoutRequest(2, 2)}], ids=str)  # fmt: skip
@pytest.mark.parametrize("to", MEGATRON)
def test_canonical_there_and_back(to: str, options: dict[str, Any], tmp_path: Path) -> None:
    if options and to != "nemo":
        options = {}
    there = convert(ADAPTER, to, tmp_path / "there", config=BASE, **options)
    settings = there.adapter
    assert settings is not None
    assert (settings.kind, settings.rank, settings.alpha) == ("lora", 4, 12)
    if to not in ("nemo", "megatron-core"):
        assert settings.base == "/workspace/example-0000000000000llama/hf"
    assert settings.targets
    back = convert(tmp_path / "there", "peft", tmp_path / "back")
    assert_equal(back.tensors, anyckpt.open(ADAPTER).tensors)
    assert (back.adapter.rank, back.adapter.alpha) == (4, 12) if back.adapter else False
    assert back.config["task_type"] == "CAUSAL_LM"
    known = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert back.config["target_modules"] == sorted(known["target_modules"])
    assert back.config["base_model_name_or_path"] == (settings.base if to != "nemo" else None)


@pytest.mark.parametrize("to", MEGATRON)
def test_fused_there_and_back(to: str, tmp_path: Path) -> None:
    there = convert(ADAPTER, to, tmp_path / "there", config=BASE, adapter_form="fused")
    assert there.adapter is not None
    assert (there.adapter.rank, there.adapter.alpha) == (12, 36)
    names = {name.split(".adapter", 1)[-1] for name in there.tensors}
    assert not any("adapter_q" in name or "_unfused_" in name for name in names)
    back = convert(tmp_path / "there", "peft", tmp_path / "back")
    assert (back.config["r"], back.config["lora_alpha"]) == (12, 36)
    first, second = products(anyckpt.open(ADAPTER), 3.0), products(back, 3.0)
    assert first.keys() == second.keys()
    for module, product in first.items():
        assert np.abs(second[module] - product).max() < 1e-6
    again = convert(tmp_path / "back", to, tmp_path / "again", config=BASE, adapter_form="fused")
    assert_equal(again.tensors, there.tensors)


def products(checkpoint: Checkpoint, scale: float) -> dict[str, np.ndarray]:
    tensors = checkpoint.tensors
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")].numpy() @ tensor.numpy()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def test_forms_of_megatron_without_a_family(tmp_path: Path) -> None:
    """Between Megatron's formats nothing but names changes, and these need no model family."""
    there = convert(NEMO, "nemo", tmp_path / "one.nemo")
    assert_equal(there.tensors, {f"model.{name}": tensor for name, tensor in anyckpt.open(NEMO).tensors.items()})
    assert there.adapter is not None and (there.adapter.rank, there.adapter.alpha) == (4, 8)
    core = convert(NEMO, "megatron-core", tmp_path / "core")
    assert (core.adapter.rank, core.adapter.alpha) == (4, 8) if core.adapter else False
    assert core.tensors["decoder.layers.mlp.linear_fc1.adapter.linear_out.weight"].shape == (2, 24, 4)
    with pytest.raises(UsageError, match=r"the base model of the adapter is not known.*--config"):
        anyckpt.convert(NEMO, tmp_path / "peft", to="peft")
    with pytest.raises(UsageError, match=r"--adapter-form canonical.*--config"):
        anyckpt.convert(NEMO, tmp_path / "x", to="megatron-core", adapter_form="canonical")


def test_layouts_and_spellings_of_one_adapter_are_equal(tmp_path: Path) -> None:
    anyckpt.convert(NEMO, tmp_path / "one.nemo", to="nemo")
    found = anyckpt.diff(NEMO, tmp_path / "one.nemo")
    assert found.equal and found.compared == 16
    anyckpt.convert(ADAPTER, tmp_path / "x.nemo", to="nemo", config=BASE)
    anyckpt.convert(ADAPTER, tmp_path / "tp2.nemo", to="nemo", config=BASE, layout=LayoutRequest(2))
    anyckpt.convert(ADAPTER, tmp_path / "core", to="megatron-core", config=BASE)
    for first, second in (("x.nemo", "tp2.nemo"), ("core", "tp2.nemo"), ("core", "x.nemo")):
        found = anyckpt.diff(tmp_path / first, tmp_path / second)
        assert found.equal and found.compared == 28 and found.names == "hub"
    found = anyckpt.diff(ADAPTER, tmp_path / "tp2.nemo")
    assert found.equal and found.compared == 28, "the base's configuration in the one names the other's modules"
    anyckpt.convert(ADAPTER, tmp_path / "other", to="nemo2", config=BASE, alpha=3)
    found = anyckpt.diff(ADAPTER, tmp_path / "other")
    assert not found.different and [setting.name for setting in found.configuration] == ["scale"]


def test_live_and_saved_names_of_one_adapter_are_equal(tmp_path: Path) -> None:
    tensors = {
        name.replace(".weight", ".default.weight"): tensor for name, tensor in anyckpt.open(ADAPTER).tensors.items()
    }
    write_plan(Plan("x", (OutputFile("live.safetensors", safetensors_parts(tensors)),)), tmp_path)
    found = anyckpt.diff(ADAPTER, tmp_path / "live.safetensors", weights_only=True)
    assert found.equal and found.compared == len(tensors)


def test_records_of_the_frameworks(tmp_path: Path) -> None:
    convert(ADAPTER, "nemo2", tmp_path / "nemo2", config=BASE)
    metadata = json.loads((tmp_path / "nemo2/weights/adapter_metadata.json").read_text())
    assert metadata == {"model_ckpt_path": "/workspace/example-0000000000000llama/hf"}
    transform = load_yaml_mapping((tmp_path / "nemo2/context/model.yaml").read_bytes(), "x")["model_transform"]
    assert transform["_target_"] == "nemo.collections.llm.peft.canonical_lora.CanonicalLoRA"
    assert (transform["dim"], transform["alpha"]) == (4, 12)
    assert sorted(transform["target_modules"]) == [
        "linear_fc1_gate", "linear_fc1_up", "linear_fc2", "linear_k", "linear_proj", "linear_q", "linear_v",
    ]  # fmt: skip
    told = anyckpt.convert(ADAPTER, tmp_path / "again", to="nemo2", config=BASE).notes
    assert any(note.startswith("NeMo 2.5 adds canonical updates") for note in told)
    assert any(note.startswith("NeMo 2.5 adds canonical updates") for note in anyckpt.open(tmp_path / "nemo2").warnings)
    told = anyckpt.convert(ADAPTER, tmp_path / "fused", to="nemo2", config=BASE, adapter_form="fused").notes
    assert not any("canonical" in note for note in told)
    convert(ADAPTER, "megatron-bridge", tmp_path / "bridge", config=BASE, adapter_form="fused")
    run = load_yaml_mapping((tmp_path / "bridge/iter_0000000/run_config.yaml").read_bytes(), "x")
    assert run["peft"]["_target_"] == "megatron.bridge.peft.lora.LoRA"
    assert sorted(run["peft"]["target_modules"]) == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert run["checkpoint"]["pretrained_checkpoint"] == "/workspace/example-0000000000000llama/hf"
    nemo = convert(ADAPTER, "nemo", tmp_path / "x.nemo", config=BASE)
    tuning = nemo.config["peft"]["lora_tuning"]
    assert (tuning["variant"], tuning["adapter_dim"], tuning["alpha"]) == ("canonical", 4, 12)
    assert set(tuning["target_modules"]) == {"attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"}


def test_ranks_are_cut_as_nemo_cuts_them(tmp_path: Path) -> None:
    written = convert(ADAPTER, "nemo", tmp_path / "x.nemo", config=BASE, adapter_form="fused",
                      layout=LayoutRequest(2, 2))  # fmt: skip
    assert written.layout == ParallelLayout(2, 2)
    from anyckpt.formats.registry import read

    ranks = {(shard.tensor_rank, shard.pipeline_rank): shard.tensors for shard in read(tmp_path / "x.nemo").ranks}
    layer = "decoder.layers.0."
    shapes = {name.removeprefix(layer): tensor.shape for name, tensor in ranks[1, 1].items()}
    assert shapes == {
        "self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight": (6, 64),
        "self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight": (64, 12),
        "self_attention.adapter_layer.lora_dense_attention_adapter.linear_in.weight": (12, 32),
        "self_attention.adapter_layer.lora_dense_attention_adapter.linear_out.weight": (32, 12),
        "mlp.adapter_layer.lora_hto4h_adapter.linear_in.weight": (6, 64),
        "mlp.adapter_layer.lora_hto4h_adapter.linear_out.weight": (80, 12),
        "mlp.adapter_layer.lora_4htoh_adapter.linear_in.weight": (12, 40),
        "mlp.adapter_layer.lora_4htoh_adapter.linear_out.weight": (32, 12),
    }
    name = "decoder.layers.1.mlp.adapter_layer.lora_hto4h_adapter.linear_out.weight"
    whole = written.tensors[name].numpy()
    local = ranks[1, 1][name.replace("layers.1", "layers.0")].numpy()
    assert np.array_equal(local, np.concatenate([whole[40:80], whole[120:160]])), "a half of the gate, a half of up"


@pytest.mark.parametrize("layout", [LayoutRequest(1, 1), LayoutRequest(4, 1), LayoutRequest(1, 2)], ids=str)
def test_resharding(layout: LayoutRequest, tmp_path: Path) -> None:
    anyckpt.reshard(NEMO, tmp_path / "x.nemo", layout=layout)
    found = anyckpt.open(tmp_path / "x.nemo")
    assert_equal({name.removeprefix("model."): tensor for name, tensor in found.tensors.items()},
                 anyckpt.open(NEMO).tensors)  # fmt: skip
    assert found.layout == ParallelLayout(layout.tensor_parallel or 1, layout.pipeline_parallel or 1)
    assert found.adapter is not None and (found.adapter.rank, found.adapter.alpha) == (4, 8)


def test_casting_and_copying(tmp_path: Path) -> None:
    cast = convert(ADAPTER, "peft", tmp_path / "bf16", dtype="bf16")
    assert {tensor.dtype.name for tensor in cast.tensors.values()} == {"bfloat16"}
    assert cast.config == anyckpt.open(ADAPTER).config
    done = anyckpt.convert(ADAPTER, tmp_path / "x.safetensors", to="safetensors")
    assert any("no place for the adapter's settings" in note for note in done.notes)
    loose = anyckpt.open(tmp_path / "x.safetensors")
    assert loose.adapter is None
    with pytest.raises(UsageError, match=r"does not say its alpha.*--alpha"):
        anyckpt.convert(loose, tmp_path / "y", to="nemo2", config=BASE, sources=[tmp_path / "x.safetensors"])
    again = convert(tmp_path / "x.safetensors", "peft", tmp_path / "again", config=BASE, alpha=12)
    assert_equal(again.tensors, anyckpt.open(ADAPTER).tensors)


def test_what_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"is an adapter, and hf holds models.*merge-lora"):
        anyckpt.convert(ADAPTER, out, to="hf", config=BASE)
    with pytest.raises(UsageError, match="is an adapter, and megatron-lm holds models"):
        anyckpt.convert(ADAPTER, out, to="megatron-lm", config=BASE)
    with pytest.raises(UsageError, match=r"without the base model's configuration.*--config"):
        anyckpt.convert(ADAPTER, out, to="nemo2")
    with pytest.raises(UsageError, match="unknown form of adapter"):
        anyckpt.convert(ADAPTER, out, to="nemo2", config=BASE, adapter_form="split")
    trained = copied(tmp_path / "trained")
    (trained / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="leave --optimizer keep out"):
        anyckpt.convert(trained, out, to="nemo2", config=BASE, optimizer="keep")
    with pytest.raises(UsageError, match="leave --names out"):
        anyckpt.convert(ADAPTER, out, to="dcp", names="hf")
    with pytest.raises(UsageError, match="is a model, and peft holds adapters"):
        anyckpt.convert(BASE, out, to="peft")
    with pytest.raises(UsageError, match="is no adapter"):
        anyckpt.convert(BASE, out, to="nemo2", alpha=1.0)
    with pytest.raises(MappingError, match="the adapter is of another base model"):
        anyckpt.convert(ADAPTER, out, to="nemo2", config=fixture_path("families/gemma/hf"))
    with pytest.raises(UsageError, match="--alpha must be a number"):
        anyckpt.convert(ADAPTER, out, to="nemo2", config=BASE, alpha=float("nan"))
    assert not out.exists()


def test_kinds_that_are_not_understood(tmp_path: Path) -> None:
    folder = copied(tmp_path / "a", use_qalora=True)
    assert anyckpt.inspect(folder).adapter["kind"] == "lora with use_qalora"  # type: ignore[index]
    with pytest.raises(UsageError, match=r"of a kind that is not understood.*found lora with use_qalora"):
        anyckpt.convert(folder, tmp_path / "x", to="nemo2", config=BASE)
    with pytest.raises(UsageError, match="of a kind that is not understood"):
        anyckpt.merge_lora(BASE, folder, tmp_path / "x")


@pytest.mark.parametrize("to", ["peft", "safetensors", "torch", "dcp"])
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.ia3_l", "layers.0.self_attn.q_proj.lora_A", "embeddings"])
def test_kinds_that_are_not_understood_are_copied(name: str, to: str, tmp_path: Path) -> None:
    """What a tensor means is no matter for a copy: IA3, AdaLoRA and prompts keep their names and settings."""
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {f"base_model.model.model.{name}": from_array(np.arange(12, dtype="f4").reshape(3, 4))}
    settings = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_plan(Plan("x", (OutputFile("adapter_model.safetensors", safetensors_parts(tensors)),)), folder)
    done = anyckpt.convert(folder, tmp_path / "out", to=to)
    assert_equal(anyckpt.open(tmp_path / "out").tensors, tensors)
    if to == "peft":
        assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == settings
    else:
        assert "no place for the adapter's settings: that it is of kind ia3" in done.notes[0]
    with pytest.raises(UsageError, match="not understood"):
        anyckpt.convert(folder, tmp_path / "x", to=to, alpha=3)


def other_kind(path: Path, **settings: Any) -> Path:
    path.mkdir()
    tensors = {"base_model.model.q.oft_R.weight": from_array(np.ones((2, 6), "f4"))}
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 0, "oft_block_size": 4, **settings}))
    write_plan(Plan("x", (OutputFile("adapter_model.safetensors", safetensors_parts(tensors)),)), path)
    return path


def test_numbers_of_other_kinds_are_theirs(tmp_path: Path) -> None:
    """peft writes rank 0 for OFT that is given a size of blocks."""
    folder = other_kind(tmp_path / "a", rank_pattern=[], lora_alpha="none")
    assert anyckpt.verify(folder).sound
    anyckpt.convert(folder, tmp_path / "b", to="peft")
    assert anyckpt.diff(folder, tmp_path / "b").equal


@pytest.mark.parametrize("raw", [False, True])
def test_settings_of_other_kinds_are_compared(raw: bool, tmp_path: Path) -> None:
    first = other_kind(tmp_path / "a", coft=False, peft_version="0.18")
    assert anyckpt.diff(first, other_kind(tmp_path / "b", module_dropout=0.1, peft_version="0.19"), raw=raw).equal
    found = anyckpt.diff(first, other_kind(tmp_path / "c", coft=True, r=2), raw=raw)
    assert {setting.name for setting in found.configuration} == {"coft", "rank"}


def test_settings_that_no_option_gives_back_are_told(tmp_path: Path) -> None:
    plain = anyckpt.convert(copied(tmp_path / "a"), tmp_path / "a.safetensors", to="safetensors").notes[0]
    assert plain.endswith("its alpha will have to be given")
    folder = copied(tmp_path / "b", use_rslora=True, alpha_pattern={"q_proj": 3})
    note = anyckpt.convert(folder, tmp_path / "b.safetensors", to="safetensors").notes[0]
    assert "alpha_pattern" in note and "use_rslora" in note and "trainable_token_indices" not in note


def test_block_diagonal_factors_without_settings_are_no_damage(tmp_path: Path) -> None:
    """peft's BD-LoRA has the blocks of one factor one over the other."""
    path = tmp_path / "adapter.safetensors"
    tensors = {"base_model.model.q.lora_A.weight": from_array(np.ones((4, 6), "f4"))}
    tensors["base_model.model.q.lora_B.weight"] = from_array(np.ones((8, 2), "f4"))
    write_plan(Plan("x", (OutputFile(path.name, safetensors_parts(tensors)),)), tmp_path)
    found = anyckpt.verify(path)
    assert found.sound and "block-diagonal factors" in found.warnings[0]
    tensors["base_model.model.q.lora_B.weight"] = from_array(np.ones((8, 3), "f4"))
    write_plan(Plan("x", (OutputFile("other.safetensors", safetensors_parts(tensors)),)), tmp_path)
    assert "of different ranks" in anyckpt.verify(tmp_path / "other.safetensors").problems[0].problem


def copied(path: Path, **changes: Any) -> Path:
    path.mkdir()
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (path / "adapter_model.safetensors").write_bytes((ADAPTER / "adapter_model.safetensors").read_bytes())
    return path


def test_rs_lora_and_patterns(tmp_path: Path) -> None:
    folder = copied(tmp_path / "a", use_rslora=True)
    there = convert(folder, "nemo2", tmp_path / "there", config=BASE)
    assert there.adapter is not None and (there.adapter.rank, there.adapter.alpha) == (4, 24)
    folder = copied(tmp_path / "b", r=2, rank_pattern={"q_proj": 4})
    with pytest.raises(MappingError, match="contradict each other on the rank"):
        anyckpt.convert(folder, tmp_path / "x", to="nemo2", config=BASE)
    folder = copied(tmp_path / "c", alpha_pattern={"layers.0.self_attn.q_proj": 6})
    there = convert(folder, "megatron-bridge", tmp_path / "c2", config=BASE)
    name = "decoder.layers.self_attention.linear_qkv.adapter.adapter_q.linear_out.weight"
    before = anyckpt.open(ADAPTER).tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].numpy()
    assert np.array_equal(there.tensors[name][0].numpy(), before / 2)
    folder = copied(tmp_path / "d", alpha_pattern={"q_proj": 5})
    with pytest.raises(UsageError, match="modules have different scales"):
        anyckpt.convert(folder, tmp_path / "x", to="nemo2", config=BASE)


# -- inspecting ----------------------------------------------------------------------------------------------


def test_inspect() -> None:
    found = anyckpt.inspect(ADAPTER)
    assert found.adapter is not None
    assert {key: found.adapter[key] for key in ("kind", "rank", "alpha", "form", "names", "rank_stabilized")} == {
        "kind": "lora", "rank": 4, "alpha": 12, "form": "canonical", "names": "peft", "rank_stabilized": False,
    }  # fmt: skip
    assert found.to_json()["adapter"]["base"].endswith("llama/hf")
    nemo = anyckpt.inspect(NEMO)
    assert nemo.adapter is not None and (nemo.adapter["form"], nemo.adapter["alpha"]) == ("fused", 8)
    assert anyckpt.inspect(BASE).adapter is None


# -- merging -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "hf"
    done = anyckpt.merge_lora(BASE, ADAPTER, path)
    assert done.notes[0] == "merged with the LoRA adapter hf_adapter: 14 updates of rank 4"
    manifest = read_manifest(str(path))
    assert manifest is not None and manifest.notes[0] == done.notes[0], "the output says what it was made of"
    return path


def assert_same_model(first: Path, second: Path) -> None:
    names = common_names(anyckpt.open(first), anyckpt.open(second), raw=False)
    assert names.kind == "hub"
    assert_equal(names.b, names.a)


def test_merged_weights(merged: Path) -> None:
    base, adapter, found = (anyckpt.open(path).tensors for path in (BASE, ADAPTER, merged))
    assert sorted(found) == sorted(base)
    changed = 0
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            up, down = adapter[f"{module}.lora_B.weight"].numpy(), adapter[f"{module}.lora_A.weight"].numpy()
            assert np.array_equal(found[name].numpy(), tensor.numpy() + (up @ down) * np.float32(3)), name
            changed += 1
        else:
            assert np.array_equal(found[name].numpy(), tensor.numpy()), name
    assert changed == 14
    assert anyckpt.open(merged).config == anyckpt.open(BASE).config


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("nemo", {}),
        ("nemo", {"sharded": True}),
        ("nemo", {"layout": LayoutRequest(2, 2)}),
        ("nemo2", {}),
        ("megatron-core", {}),
        ("megatron-bridge", {}),
        ("megatron-lm", {"layout": LayoutRequest(2)}),
        ("megatron-lm", {"layout": LayoutRequest(2, 2)}),
        ("safetensors", {}),
        ("dcp", {}),
    ],
    ids=str,
)
def test_every_target_holds_the_same_bits(to: str, options: dict[str, Any], merged: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    anyckpt.merge_lora(BASE, ADAPTER, path, to=to, **options)
    found = anyckpt.open(path)
    if found.config:
        assert_same_model(merged, path)
    else:
        assert_equal(found.tensors, anyckpt.open(merged).tensors)


@pytest.mark.parametrize("base", ["nemo2", "megatron-lm", "nemo"])
@pytest.mark.parametrize("adapter", [*MEGATRON, "peft"])
def test_every_source_gives_the_same_bits(base: str, adapter: str, merged: Path, tmp_path: Path) -> None:
    layout = LayoutRequest(2, 2) if base == "megatron-lm" else None
    anyckpt.convert(BASE, tmp_path / "base", to=base, layout=layout)
    given = ADAPTER
    if adapter != "peft":
        given = tmp_path / "adapter"
        anyckpt.convert(ADAPTER, given, to=adapter, config=BASE)
    done = anyckpt.merge_lora(tmp_path / "base", given, tmp_path / "out")
    assert done.format == base
    assert anyckpt.open(tmp_path / "out").layout == anyckpt.open(tmp_path / "base").layout
    assert_same_model(merged, tmp_path / "out")


def test_scale_and_alpha(merged: Path, tmp_path: Path) -> None:
    base = anyckpt.open(BASE).tensors
    anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "half", scale=0.5)
    anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "alpha", alpha=6)
    anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "none", scale=0)
    assert_equal(anyckpt.open(tmp_path / "half").tensors, anyckpt.open(tmp_path / "alpha").tensors)
    assert_equal(anyckpt.open(tmp_path / "none").tensors, base)
    name = "model.layers.1.mlp.down_proj.weight"
    full, half = (anyckpt.open(path).tensors[name].numpy() for path in (merged, tmp_path / "half"))
    assert np.abs((full - base[name].numpy()) - 2 * (half - base[name].numpy())).max() < 1e-6


def test_rounding_to_the_weights_type(merged: Path, tmp_path: Path) -> None:
    """Base in bf16: the sum in float32, rounded once; with --dtype fp32 it is not rounded at all."""
    anyckpt.convert(BASE, tmp_path / "bf16", to="hf", dtype="bf16")
    anyckpt.merge_lora(tmp_path / "bf16", ADAPTER, tmp_path / "narrow")
    anyckpt.merge_lora(tmp_path / "bf16", ADAPTER, tmp_path / "wide", dtype="fp32")
    narrow, wide = anyckpt.open(tmp_path / "narrow").tensors, anyckpt.open(tmp_path / "wide").tensors
    assert {tensor.dtype.name for tensor in narrow.values()} == {"bfloat16"}
    assert {tensor.dtype.name for tensor in wide.values()} == {"float32"}
    assert_equal(narrow, {name: tensor.cast("bfloat16") for name, tensor in wide.items()})
    base, adapter = anyckpt.open(tmp_path / "bf16").tensors, anyckpt.open(ADAPTER).tensors
    name = "model.layers.0.self_attn.k_proj"
    up, down = (adapter[f"base_model.model.{name}.lora_{side}.weight"].numpy() for side in "BA")
    exact = base[f"{name}.weight"].numpy().astype("f4") + (up @ down) * np.float32(3)
    assert np.array_equal(wide[f"{name}.weight"].numpy(), exact)
    assert anyckpt.open(tmp_path / "wide").config["dtype"] == "float32"
    # a part of a fused weight is cast along where the rest of it is not adapted
    folder = copied(tmp_path / "q_only")
    kept = {name: tensor for name, tensor in adapter.items() if "q_proj" in name}
    anyckpt.convert(ADAPTER, tmp_path / "q.safetensors", to="safetensors", include="*q_proj*")
    assert len(kept) == 4
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "q.safetensors").read_bytes())
    anyckpt.merge_lora(tmp_path / "bf16", folder, tmp_path / "q", to="nemo2", dtype="fp32")
    assert {tensor.dtype.name for tensor in anyckpt.open(tmp_path / "q").tensors.values()} == {"float32"}


def test_updates_of_zeros_are_told(tmp_path: Path) -> None:
    some = {name: tensor for name, tensor in anyckpt.open(ADAPTER).tensors.items() if "k_proj" not in name}
    folder = copied(tmp_path / "a")
    anyckpt.convert(ADAPTER, tmp_path / "x.safetensors", to="safetensors", exclude="*k_proj*")
    assert len(some) == 24
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    done = anyckpt.convert(folder, tmp_path / "nemo2", to="nemo2", config=BASE)
    assert "2 updates of zeros are added: Megatron adapts all parts of a fused weight or none" in done.notes
    merge = anyckpt.merge_lora(BASE, tmp_path / "nemo2", tmp_path / "m", to="hf")
    assert any("2 updates are all zeros and change nothing" in note and "(k)" in note for note in merge.notes)
    back = convert(tmp_path / "nemo2", "peft", tmp_path / "back")
    assert_equal(back.tensors, some)


def test_targets_without_tensors_are_told(tmp_path: Path) -> None:
    targets = ["q_proj", "x_proj", "lm_head", ".*odd", "layers.1.mlp.up_proj"]
    done = anyckpt.merge_lora(BASE, copied(tmp_path / "a", target_modules=targets), tmp_path / "out", dry_run=True)
    assert done.notes[1] == "the adapter's settings name modules that it has no tensors for: x_proj, lm_head"


def test_a_tied_embedding_is_told(tmp_path: Path) -> None:
    base = fixture_path("families/llama_tied_bf16/hf")
    rows, hidden = anyckpt.open(base).tensors["model.embed_tokens.weight"].shape
    module = "base_model.model.model.embed_tokens"
    tensors = {
        f"{module}.lora_embedding_A": from_array(np.ones((1, rows), "f4")),
        f"{module}.lora_embedding_B": from_array(np.ones((hidden, 1), "f4")),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    write_plan(Plan("x", (OutputFile("adapter_model.safetensors", safetensors_parts(tensors)),)), tmp_path / "a")
    done = anyckpt.merge_lora(base, tmp_path / "a", tmp_path / "out", to="nemo2")
    assert any("the embedding, which is the output layer, too" in note for note in done.notes)
    assert not any("output_layer" in name for name in anyckpt.open(tmp_path / "out").tensors)


def test_a_quantized_base(tmp_path: Path) -> None:
    """Quantized weights are numbers before anything is added to them, which has to be asked for."""
    base = fixture_path("quant/nvfp4_b/hf")
    config = json.loads((base / "config.json").read_text())
    hidden, rng = config["hidden_size"], np.random.default_rng(0)
    module = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {
        f"{module}.lora_A.weight": from_array(rng.random((2, config["intermediate_size"]), "f4")),
        f"{module}.lora_B.weight": from_array(rng.random((hidden, 2), "f4")),
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    write_plan(Plan("x", (OutputFile("adapter_model.safetensors", safetensors_parts(tensors)),)), folder)
    with pytest.raises(MappingError, match="the model is quantized.*--dtype"):
        anyckpt.merge_lora(base, folder, tmp_path / "out")
    anyckpt.merge_lora(base, folder, tmp_path / "out", dtype="fp32")
    anyckpt.convert(base, tmp_path / "plain", to="hf", dtype="fp32")
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (anyckpt.open(tmp_path / path).tensors for path in ("plain", "out"))
    delta = tensors[f"{module}.lora_B.weight"].numpy() @ tensors[f"{module}.lora_A.weight"].numpy()
    assert np.abs(after[name].numpy() - before[name].numpy() - delta).max() < 1e-5
    assert_equal({key: t for key, t in after.items() if key != name}, {k: t for k, t in before.items() if k != name})


def test_mixers_keep_their_numbers(tmp_path: Path) -> None:
    """Megatron-Core's stack of Mamba layers has a tensor per layer in a distributed checkpoint."""
    base = fixture_path("families/nemotron_h/hf")
    model = anyckpt.open(base)
    weights = {name: tensor for name, tensor in model.tensors.items() if name.endswith("mixer.in_proj.weight")}
    tensors = {}
    for name, tensor in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = from_array(np.ones((2, tensor.shape[1]), "f4"))
        tensors[f"{module}.lora_B.weight"] = from_array(np.ones((tensor.shape[0], 2), "f4"))
    assert tensors
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    write_plan(Plan("x", (OutputFile("adapter_model.safetensors", safetensors_parts(tensors)),)), folder)
    there = convert(folder, "megatron-core", tmp_path / "core", config=base)
    assert {name.split(".")[2].isdigit() for name in there.tensors} == {True}
    back = convert(tmp_path / "core", "peft", tmp_path / "back", config=base)
    assert len(back.tensors) == len(tensors)


def test_what_is_not_merged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="is no adapter.*BASE first"):
        anyckpt.merge_lora(ADAPTER, BASE, out)
    with pytest.raises(UsageError, match="is an adapter, not a model"):
        anyckpt.merge_lora(ADAPTER, ADAPTER, out)
    with pytest.raises(MappingError, match="the adapter is of another base model"):
        anyckpt.merge_lora(fixture_path("families/gemma/hf"), ADAPTER, out)
    with pytest.raises(MappingError, match="no rule of family phi3 has a module that this adapts"):
        anyckpt.merge_lora(fixture_path("families/phi3/hf"), ADAPTER, out)
    with pytest.raises(UsageError, match="--scale must be a number"):
        anyckpt.merge_lora(BASE, ADAPTER, out, scale=float("inf"))
    for meaningless in ("optimizer", "names", "adapter_form"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{meaningless}'"):
            anyckpt.merge_lora(BASE, ADAPTER, out, **{meaningless: "keep"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds the source|lies inside the source|are the same"):
        anyckpt.merge_lora(BASE, ADAPTER, ADAPTER)
    with pytest.raises(FormatError, match="does not exist"):
        anyckpt.merge_lora(BASE, tmp_path / "nothing", out)
    out.mkdir()
    with pytest.raises(OutputError, match="already exists"):
        anyckpt.merge_lora(BASE, ADAPTER, out)


def test_a_base_of_no_known_family(tmp_path: Path) -> None:
    anyckpt.convert(fixture_path("families/phi3/hf"), tmp_path / "y.safetensors", to="safetensors")
    with pytest.raises(UsageError, match=r"family is not known.*--family and --config"):
        anyckpt.merge_lora(tmp_path / "y.safetensors", ADAPTER, tmp_path / "out")
    anyckpt.convert(BASE, tmp_path / "x.safetensors", to="safetensors")
    anyckpt.merge_lora(tmp_path / "x.safetensors", ADAPTER, tmp_path / "named")
    assert anyckpt.open(tmp_path / "named").format == "safetensors"
    anyckpt.merge_lora(tmp_path / "x.safetensors", ADAPTER, tmp_path / "out", to="hf", config=BASE / "config.json")
    assert anyckpt.open(tmp_path / "out").config["model_type"] == "llama"


def test_some_of_the_adapter(tmp_path: Path) -> None:
    done = anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "out", exclude=["*mlp*", "*layers.0*"])
    assert "4 updates of rank 4" in done.notes[0] and len(done.ignored) == 20
    base, found = anyckpt.open(BASE).tensors, anyckpt.open(tmp_path / "out").tensors
    changed = {name for name, tensor in base.items() if not np.array_equal(tensor.numpy(), found[name].numpy())}
    assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    with pytest.raises(UsageError, match="no tensor matches --include"):
        anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "x", include="*nothing*")


def test_dry_run(tmp_path: Path) -> None:
    done = anyckpt.merge_lora(BASE, ADAPTER, tmp_path / "out", to="nemo2", dry_run=True)
    assert done.dry_run and not (tmp_path / "out").exists()
    assert done.tensors
