"""``anyckpt verify``: sound, damaged, unreadable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.cli.bad_inputs import edited
from tests.cli.runner import Runner
from tests.cli.test_diff import written
from tests.support import fixture_path

import anyckpt as api

LLAMA = "families/llama/hf"
TARGETS = ["hf", "safetensors", "torch", "lightning", "dcp", "megatron-core", "nemo", "nemo2"]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def location_of(path: Path, name: str) -> tuple[Path, int]:
    """File and offset of a tensor's first byte."""
    piece = next(api.open(path).tensors[name].pieces())
    file, start = piece.source.locate()
    assert file is not None
    return Path(file), start + piece.offset


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_outputs_are_sound_and_a_flipped_bit_is_not(anyckpt: Runner, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    assert anyckpt("convert", fixture_path(LLAMA), out, "--to", target).code == 0
    found = anyckpt("verify", out, "--deep", "--json")
    assert found.code == 0
    assert found.json["sound"] is True
    assert found.json["problems"] == []
    assert found.json["checked"]["digests"] > 0
    assert found.json["checked"]["values"] >= found.json["checked"]["tensors"] == found.json["checked"]["proved"]
    file, offset = location_of(out, list(api.open(out).tensors)[3])
    flip(file, offset)
    damaged = anyckpt("verify", out, "--json")
    assert damaged.code == 1
    assert damaged.json["sound"] is False
    assert "bytes differ from the manifest" in damaged.json["problems"][0]["problem"]
    assert "damaged" in anyckpt("verify", out).out


@pytest.mark.parametrize("target", ["torch", "dcp"])
def test_the_manifest_answers_for_headers_and_padding_too(anyckpt: Runner, tmp_path: Path, target: str) -> None:
    source, out = written(tmp_path / "x.safetensors", a=np.ones(3, dtype=np.float32)), tmp_path / "out"
    assert anyckpt("convert", source, out, "--to", target).code == 0
    file = out if out.is_file() else next(out.glob("*.distcp"))
    for offset in range(0, file.stat().st_size, 11):
        flip(file, offset)
        assert anyckpt("verify", out).code != 0, offset
        flip(file, offset)
    assert anyckpt("verify", out).code == 0


@pytest.mark.parametrize("target", ["torch", "lightning", "dcp", "megatron-core", "nemo", "nemo2"])
def test_without_a_manifest_the_containers_checksums_tell(anyckpt: Runner, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    assert anyckpt("convert", fixture_path(LLAMA), out, "--to", target).code == 0
    (out / ".anyckpt-manifest.json" if out.is_dir() else tmp_path / ".out.anyckpt-manifest.json").unlink()
    sound = anyckpt("verify", out, "--json").json
    assert sound["sound"] is True
    assert sound["checked"]["digests"] == 0
    assert sound["checked"]["checksums"] >= 9
    file, offset = location_of(out, list(api.open(out).tensors)[3])
    flip(file, offset)
    damaged = anyckpt("verify", out, "--json")
    assert damaged.code == 1
    assert "CRC-32" in damaged.json["problems"][0]["problem"]


@pytest.mark.parametrize(
    "relative",
    [
        "legacy/zoo_kinds/zip.pt", "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt", "mcore/dcp_fsdp_w2/ckpt",
        "mcore/gpt_dense_tp2pp2/ckpt", "nemo/nemo1_basic_v3_0_0/toy.nemo", "nemo/nemo1_dist_tp2/model.nemo",
        "nemo/nemo2_llama_hftok/model", "nemo/lightning_fsdp2/m-step=2.ckpt",
    ],
)  # fmt: skip
def test_what_real_software_wrote_is_sound_and_its_checksums_are_checked(anyckpt: Runner, relative: str) -> None:
    found = anyckpt("verify", fixture_path(relative), "--json")
    assert found.code == 0, found.json["problems"]
    assert found.json["checked"]["checksums"] > 0


def test_a_checksum_of_zero_was_never_computed(anyckpt: Runner, tmp_path: Path) -> None:
    import io
    import zipfile

    source = fixture_path("legacy/zoo_kinds/zip.pt")
    with zipfile.ZipFile(source) as archive:
        crcs = {info.filename: info.CRC for info in archive.infolist() if "/data/" in info.filename}
    data = bytearray(source.read_bytes())
    for crc in crcs.values():
        found = crc.to_bytes(4, "little")
        while found in data:
            at = data.index(found)
            data[at : at + 4] = bytes(4)
    path = tmp_path / "nocrc.pt"
    path.write_bytes(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {info.CRC for info in archive.infolist() if "/data/" in info.filename} == {0}
    shown = anyckpt("verify", path, "--json")
    assert shown.code == 0, shown.json["problems"]
    assert shown.json["checked"]["checksums"] < len(crcs)


def test_a_missing_layer_is_damage(anyckpt: Runner, tmp_path: Path) -> None:
    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    found = anyckpt("verify", edited(tmp_path, change), "--json")
    assert found.code == 1
    assert "layer 1 is missing" in found.json["problems"][0]["problem"]
    assert anyckpt("verify", fixture_path(LLAMA), "--json").json["checked"]["model"] is True


def test_deep_finds_nan_infinity_and_denormal_numbers(anyckpt: Runner, tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.safetensors",
        good=np.ones(4, dtype=np.float32),
        bad=np.array([np.nan, 1, np.inf, -np.inf], dtype=np.float32),
        odd=np.array([1e-42, 1], dtype=np.float32),
        integers=np.array([1]),
    )
    assert anyckpt("verify", path).code == 0
    found = anyckpt("verify", path, "--deep", "--json")
    assert found.code == 1
    assert found.json["problems"] == [{"where": "bad", "problem": "1 NaN and 2 infinite of 4 elements"}]
    assert found.json["warnings"] == ["denormal numbers, as a stray write leaves them, in odd (1 of 2)"]
    assert found.json["checked"]["values"] == 3
    text = anyckpt("verify", path, "--deep").out
    assert "damaged (1 problem); " in text
    assert "finite" not in text.splitlines()[-1]


def test_a_file_that_the_manifest_names_is_missing(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert anyckpt("convert", fixture_path(LLAMA), out, "--to", "hf").code == 0
    (out / "tokenizer_config.json").unlink()
    found = anyckpt("verify", out, "--json")
    assert found.code == 1
    assert "tokenizer_config.json" in found.json["problems"][0]["problem"]


def test_a_manifest_of_another_file_says_how_to_get_rid_of_it(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert anyckpt("convert", fixture_path(LLAMA), out, "--to", "safetensors").code == 0
    shutil.copy(fixture_path("families/mistral_swa/hf/model.safetensors"), out)
    found = anyckpt("verify", out, "--json")
    assert found.code == 1
    manifest = tmp_path / ".out.safetensors.anyckpt-manifest.json"
    assert f"delete {manifest}" in found.json["problems"][0]["problem"]
    manifest.unlink()
    assert anyckpt("verify", out).code == 0


def test_a_damaged_manifest_is_said_and_the_rest_is_checked(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(fixture_path(LLAMA), out)
    (out / ".anyckpt-manifest.json").write_text("{")
    found = anyckpt("verify", out, "--json")
    assert found.code == 1
    assert found.json["problems"][0]["where"] == "manifest"
    assert found.json["checked"]["tensors"] == 21
    assert json.dumps(found.json)


def test_what_cannot_be_opened_is_exit_code_2(anyckpt: Runner, tmp_path: Path) -> None:
    assert "does not exist" in anyckpt("verify", tmp_path / "nothing").error


@pytest.mark.parametrize(
    ("fixture", "removed", "problem"),
    [
        ("mcore/gpt_dense_tp2pp2/ckpt", "metadata.json", "metadata.json"),
        ("nemo/nemo2_llama_spm/model", "weights/metadata.json", "metadata.json"),
        ("nemo/nemo2_llama_spm/model", "context/io.json", "io.json"),
    ],
)
def test_what_its_framework_refuses_is_not_sound(
    anyckpt: Runner, tmp_path: Path, fixture: str, removed: str, problem: str
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(fixture_path(fixture), path)
    assert anyckpt("verify", path).code == 0
    (path / removed).unlink()
    found = anyckpt("verify", path, "--json")
    assert found.code == 1
    assert any(problem in entry["problem"] for entry in found.json["problems"])


ADAPTER = "families/lora_llama/hf_adapter"


def test_a_whole_adapter_is_sound(anyckpt: Runner, tmp_path: Path) -> None:
    assert anyckpt("verify", fixture_path(ADAPTER)).code == 0
    words = ("convert", fixture_path(ADAPTER), tmp_path / "fused", "--to", "megatron-core", "--adapter-form", "fused")
    assert anyckpt(*words, "--config", fixture_path("families/llama/hf")).code == 0
    assert anyckpt("verify", tmp_path / "fused").code == 0


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_without_one_factor_is_damaged(factor: str, anyckpt: Runner, tmp_path: Path) -> None:
    name = f"base_model.model.model.layers.1.mlp.down_proj.{factor}.weight"
    words = ("convert", fixture_path(ADAPTER), tmp_path / "part", "--to", "safetensors", "--exclude", name)
    assert anyckpt(*words).code == 0
    shutil.copytree(fixture_path(ADAPTER), tmp_path / "adapter")
    shutil.copy(tmp_path / "part", tmp_path / "adapter" / "adapter_model.safetensors")
    result = anyckpt("verify", tmp_path / "adapter")
    assert result.code == 1
    assert f"has no {factor}" in result.out + result.err
