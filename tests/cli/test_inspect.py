"""``anyckpt inspect``: its JSON contract on what real software wrote, and its text."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.support import expected_of, fixture_path

from anyckpt.cli.model_line import model_line
from anyckpt.operations.inspect import _MODEL_FIELDS

CONTRACT: dict[str, type | tuple[type, ...]] = {
    "path": str, "format": str, "format_version": (str, type(None)), "family": (str, type(None)), "parameters": int,
    "bytes": int, "tensor_count": int, "dtypes": dict, "layout": dict, "step": (int, type(None)),
    "has_optimizer": bool, "artifacts": list, "config": dict, "warnings": list,
}  # fmt: skip

CASES = {
    "families/llama/hf": "hf",
    "families/llama/hf/model.safetensors": "safetensors",
    "legacy/zoo_objects/zip.pt": "torch",
    "legacy/zoo_legacy_tar/old.pt": "torch",
    "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt": "lightning",
    "mcore/dcp_fsdp_w2/ckpt": "dcp",
    "mcore/gpt_opt_plain/ckpt": "megatron-core",
    "mcore/gpt_dense_tp2pp2/ckpt": "megatron-core",
    "nemo/lightning_fsdp2/m-step=2.ckpt": "lightning",
    "nemo/nemo1_basic_v3_0_0/toy.nemo": "nemo",
    "nemo/asr_ctc_conformer_v3_0_0/ctc.nemo": "nemo",
    "nemo/nemo1_dist_tp2/model.nemo": "nemo",
    "nemo/nemo2_llama_hftok/model": "nemo2",
    "nemo/speechlm2_v3_0_0/model": "hf",
}


@pytest.mark.parametrize(("relative", "name"), CASES.items(), ids=CASES)
def test_the_json_contract_holds_for_every_format(anyckpt: Runner, relative: str, name: str) -> None:
    path = fixture_path(relative)
    found = anyckpt("inspect", path, "--json").json
    for key, kind in CONTRACT.items():
        assert isinstance(found[key], kind), (key, found[key])
    assert found["path"] == str(path)
    assert found["format"] == name
    assert set(found["layout"]) == {"tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel"}
    assert all(type(size) is int and size >= 1 for size in found["layout"].values())
    assert sum(found["dtypes"].values()) == found["tensor_count"]
    assert set(found["dtype_bytes"]) == set(found["dtypes"])
    assert found["bytes"] == sum(found["dtype_bytes"].values()) > 0
    assert found["parameters"] > 0
    assert "tensors" not in found


@pytest.mark.parametrize("relative", CASES, ids=CASES)
def test_the_text_is_for_people_and_clean(anyckpt: Runner, relative: str) -> None:
    found = anyckpt("inspect", fixture_path(relative), "--tensors", "*", "--stats")
    assert found.code == 0
    assert CASES[relative] in found.out
    assert "\x1b" not in found.out
    assert all(line.startswith("warning: ") for line in found.err.splitlines())


@pytest.mark.parametrize("relative", CASES, ids=CASES)
def test_listed_tensors_have_the_contracts_keys(anyckpt: Runner, relative: str) -> None:
    found = anyckpt("inspect", fixture_path(relative), "--tensors", "*", "--digest", "--stats", "--json").json
    assert len(found["tensors"]) == found["tensor_count"]
    for tensor in found["tensors"]:
        assert set(tensor) - {"stats", "same_as"} == {"name", "dtype", "shape", "nbytes", "shards", "files", "sha256"}
        assert type(tensor["shards"]) is int
        assert len(tensor["sha256"]) == 64
        assert bool(tensor["files"]) == bool(tensor["shards"])
        if "stats" in tensor:
            assert set(tensor["stats"]) == {
                "min",
                "max",
                "mean",
                "std",
                "zeros",
                "nan",
                "inf",
                "negative_inf",
                "denormals",
            }


def test_without_being_asked_no_stats_and_digests_are_computed(anyckpt: Runner) -> None:
    path = fixture_path("families/llama/hf")
    listed = anyckpt("inspect", path, "--tensors", "*.norm.weight", "--json").json["tensors"]
    assert [tensor["name"] for tensor in listed] == ["model.norm.weight"]
    assert set(listed[0]) == {"name", "dtype", "shape", "nbytes", "shards", "files"}
    assert listed[0]["files"] == ["model.safetensors"]
    assert len(anyckpt("inspect", path, "--stats", "--json").json["tensors"]) == 21
    assert len(anyckpt("inspect", path, "--digest", "--json").json["tensors"]) == 21


def test_digests_are_those_of_torchs_tensors(anyckpt: Runner) -> None:
    relative = "mcore/gpt_dense_tp2pp2"
    expected = expected_of(relative)["tensors"]
    listed = anyckpt("inspect", fixture_path(relative) / "ckpt", "--digest", "--json").json["tensors"]
    assert {tensor["name"]: tensor["sha256"] for tensor in listed} == {n: e["sha256"] for n, e in expected.items()}


def test_hub_names_and_their_bytes_are_those_of_megatron_core(anyckpt: Runner) -> None:
    folder = fixture_path("families/llama")
    data = (folder / "mcore_te.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    expected = {
        name: hashlib.sha256(data[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]]).hexdigest()
        for name, e in header.items()
    }
    found = anyckpt("inspect", folder / "hf", "--names", "hub", "--digest", "--json").json
    assert found["family"] == "llama"
    padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
    digests = {tensor["name"]: tensor["sha256"] for tensor in found["tensors"]}
    assert set(digests) == set(expected)
    assert {n: d for n, d in digests.items() if n not in padded} == {
        n: d for n, d in expected.items() if n not in padded
    }


def test_hub_names_of_an_unknown_model_are_an_error(anyckpt: Runner) -> None:
    path = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    assert "--names stored" in anyckpt("inspect", path, "--names", "hub").error


def test_a_glob_that_matches_nothing_is_an_error(anyckpt: Runner) -> None:
    assert "no tensor matches 'x*y'" in anyckpt("inspect", fixture_path("families/llama/hf"), "--tensors", "x*y").error


def test_stats_are_those_of_numpy(anyckpt: Runner) -> None:
    import anyckpt as api

    path = fixture_path("families/llama_tied_bf16/hf")
    name = "model.embed_tokens.weight"
    stats = anyckpt("inspect", path, "--tensors", name, "--stats", "--json").json["tensors"][0]["stats"]
    array = api.open(path).tensors[name].numpy().astype(np.float64)
    assert (stats["min"], stats["max"]) == (array.min(), array.max())
    assert stats["mean"] == pytest.approx(array.mean(), rel=1e-12)
    assert stats["std"] == pytest.approx(array.std(), rel=1e-12)


def test_training_state_is_shown(anyckpt: Runner) -> None:
    found = anyckpt("inspect", fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt"), "--json").json
    assert found["step"] == 2
    assert found["has_optimizer"] is True
    assert found["states"]["optimizer"] is True
    text = anyckpt("inspect", fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt")).out
    assert "step 2" in text
    assert "optimizer" in text


def test_parallel_layout_is_shown(anyckpt: Runner) -> None:
    found = anyckpt("inspect", fixture_path("mcore/gpt_dense_tp2pp2/ckpt"), "--json").json
    assert found["layout"]["tensor_parallel"] == 2
    assert found["layout"]["pipeline_parallel"] == 2


def test_artifacts_and_configuration_of_an_archive_are_shown(anyckpt: Runner) -> None:
    relative = "nemo/nemo1_basic_v3_0_0"
    found = anyckpt("inspect", fixture_path(relative) / "toy.nemo", "--json").json
    assert found["artifacts"]
    assert found["config"]["target"]
    text = anyckpt("inspect", fixture_path(relative) / "toy.nemo").out
    assert found["artifacts"][0] in text
    assert "target" in text


def test_tied_weights_count_once(anyckpt: Runner) -> None:
    found = anyckpt("inspect", fixture_path("nemo/nemo1_basic_v3_0_0/toy.nemo"), "--json").json
    listed = anyckpt("inspect", fixture_path("nemo/nemo1_basic_v3_0_0/toy.nemo"), "--tensors", "*", "--json").json
    assert found["bytes"] < sum(tensor["nbytes"] for tensor in listed["tensors"])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("llama", "2 layers of width 64, MLP "),
        ("vit", "images of"), ("clip_vision", "images of"), ("t5_v1_1", "encoder and"),
        ("megatron_bert", "2 token types, tied embeddings"), ("mixtral", "experts, 2 for a token"),
        ("deepseek_v3", "of latent attention"), ("nemotron_h", "Mamba heads of"),
    ],
)  # fmt: skip
def test_the_line_of_a_model_says_what_its_kind_has(anyckpt: Runner, name: str, line: str) -> None:
    text = anyckpt("inspect", fixture_path(f"families/{name}/hf")).out
    model = next(row for row in text.splitlines() if row.startswith("model "))
    assert line in model
    sees = "images" in line
    assert ("tokens" in model) != sees and ("embeddings" in model) != sees


def test_the_line_of_a_model_of_mamba_alone() -> None:
    model = dict.fromkeys(_MODEL_FIELDS) | {
        "num_layers": 1, "hidden_size": 1024, "ffn_hidden_size": 1024, "hybrid_override_pattern": "M",
        "mamba_num_heads": 8, "mamba_head_dim": 64,
    }  # fmt: skip
    assert model_line(model) == (
        "1 layer (1 Mamba) of width 1,024, 8 Mamba heads of 64, unknown vocabulary, untied embeddings"
    )


def test_a_sparse_archive_of_100_gigabytes_is_opened_without_reading_it(anyckpt: Runner, tmp_path: Path) -> None:
    import struct

    count = 100_000_000_000 // 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    found = anyckpt("inspect", path, "--json").json
    assert (found["bytes"], found["parameters"]) == (4 * count, count)


def test_state_that_is_no_tensor_is_shown_as_data(anyckpt: Runner) -> None:
    path = fixture_path("legacy/ptl_adamw") / "model--val_loss=0.5-epoch=3.ckpt"
    found = anyckpt("inspect", path, "--json").json
    assert list(found["values"]) == found["objects"]
    assert found["values"]["epoch"] == found["epoch"] == 3
    assert "other state" in anyckpt("inspect", path).out


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("reduce_os_system", "posix.system"), ("getattr_chain", "torch.os.system"),
        ("reduce_builtin_exec", "builtins.exec"), ("nested_pickle_loads", "_pickle.loads"),
        ("stack_global_proto4", "os.system"), ("torch_load_gadget", "torch.serialization.load"),
    ],
)  # fmt: skip
def test_what_a_hostile_pickle_asks_for_is_said_and_not_done(anyckpt: Runner, name: str, call: str) -> None:
    found = anyckpt("inspect", fixture_path(f"legacy/malicious/{name}.pt"), "--json").json
    assert any(call in warning and "nothing was called" in warning for warning in found["warnings"])


def test_ordinary_objects_are_no_reason_to_warn(anyckpt: Runner) -> None:
    for relative in ("legacy/zoo_objects/zip.pt", "legacy/zoo_kinds/zip.pt", "legacy/averaging/m--epoch=0.ckpt"):
        found = anyckpt("inspect", fixture_path(relative), "--json").json
        assert not [callee for callee in found["calls"] if callee["kind"] == "code"]
        assert not any("find out where the file came from" in warning for warning in found["warnings"])


def test_a_checkpoint_inside_the_directory_is_pointed_to(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copytree(fixture_path("families/llama/hf"), tmp_path / "snapshot")
    error = anyckpt("inspect", tmp_path).error
    assert error.endswith(f"open {tmp_path / 'snapshot'}, which looks like hf")


def test_the_only_weights_in_a_trainers_folder_are_opened(anyckpt: Runner, tmp_path: Path) -> None:
    """As accelerate's FSDP plugin lays a checkpoint out; the optimizer's folder is a checkpoint of the same form."""
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        shutil.copytree(fixture_path("mcore/dcp_fsdp_w2") / "ckpt", tmp_path / name)
    (tmp_path / "scheduler.pt").write_bytes(b"x")
    for number in range(30):
        (tmp_path / f"optimizer_rng_state_{number}.pth").write_bytes(b"x")
    found = anyckpt("inspect", tmp_path, "--json").json
    assert (found["path"], found["format"]) == (str(tmp_path / "pytorch_model_fsdp_0"), "dcp")
    told = "pytorch_model_fsdp_0 is the only checkpoint of weights in"
    assert any(
        told in warning and "the training state beside it is not read" in warning for warning in found["warnings"]
    )
    assert told in anyckpt("convert", tmp_path, tmp_path.with_name("copy"), "--to", "dcp").err
    assert anyckpt("diff", tmp_path, tmp_path.with_name("copy"), "--weights-only").code == 0
    shutil.rmtree(tmp_path / "pytorch_model_fsdp_0")
    assert f"open {tmp_path / 'optimizer_0'}, which looks like dcp" in anyckpt("inspect", tmp_path).error
    for name in "ab":
        shutil.copytree(fixture_path("mcore/dcp_fsdp_w2") / "ckpt", tmp_path / name)
    found = f"open {tmp_path / 'a'}, which looks like dcp or {tmp_path / 'b'}, which looks like dcp"
    assert anyckpt("inspect", tmp_path).error.endswith(found)


def test_calls_of_the_only_weights_in_a_folder_are_said(anyckpt: Runner, tmp_path: Path) -> None:
    attack = fixture_path("legacy/modules/whole_module.pt")
    for name in ("model.pt", "optimizer.pt"):
        shutil.copy(attack, tmp_path / name)
    alone, inside = (anyckpt("inspect", path, "--json").json["calls"] for path in (tmp_path / "model.pt", tmp_path))
    assert alone and inside == alone


@pytest.mark.parametrize(
    ("head", "title"),
    [(b"tjgg\x03\0\0\0", "a GGML file"), (b"\x93NUMPY\x01\0", "a NumPy array"),
     (b"\x1f\x8b\x08\0", "compressed by gzip"), (b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
     (b"\x89HDF\r\n\x1a\n", "an HDF5 file")],
)  # fmt: skip
def test_files_of_other_software_are_named(anyckpt: Runner, tmp_path: Path, head: bytes, title: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(head + bytes(600))
    error = anyckpt("inspect", path).error
    assert f"{path}: is {title}" in error and "which is not read" in error


def test_a_missing_sentencepiece_model_is_said(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("nemo/nemo2_llama_spm/model"), path)
    next((path / "context").glob("*.model")).unlink()
    found = anyckpt("inspect", path, "--json").json
    assert any("sentencepiece model is not in context" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("relative", "part", "text"),
    [
        ("mcore/gpt_dense_tp2pp2/ckpt", "__0_0.distcp", "is one shard of a distributed checkpoint"),
        ("mcore/gpt_dense_tp2pp2/ckpt", ".metadata", "which looks like megatron-core"),
        ("families/llama/hf", "config.json", "which looks like hf"),
        ("nemo/nemo2_llama_spm/model", "context", "which looks like nemo2"),
    ],
)
def test_a_part_of_a_checkpoint_leads_to_the_whole(anyckpt: Runner, relative: str, part: str, text: str) -> None:
    error = anyckpt("inspect", fixture_path(relative) / part).error
    assert text in error
    assert str(fixture_path(relative)) in error.rpartition(";")[2]


def test_a_torch_file_under_the_name_of_another_format_is_read(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(fixture_path("legacy/zoo_kinds/zip.pt"), path)
    assert anyckpt("inspect", path, "--json").json["format"] == "torch"
