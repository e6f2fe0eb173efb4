"""``anyckpt convert --quantize``: what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tests.cli.runner import Runner
from tests.quantization.modelopt_cases import statistics_of
from tests.quantization.quantized import write_folder
from tests.support import fixture_path

SOURCE = "quant/src_llama_a/hf"


def test_people_see_the_layers(anyckpt: Runner, tmp_path: Path) -> None:
    asked = ("--to", "hf", "--quantize", "int8", "--report", tmp_path / "r.json")
    found = anyckpt("convert", fixture_path(SOURCE), tmp_path / "q", *asked)
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].split() == ["layer", "SQNR", "largest", "error", "saturated", "before", "after"]
    assert lines[1].startswith("model.layers.0 ")
    assert lines[3].startswith("total ")
    assert "cast bfloat16 -> int8: 14 tensors" in found.out
    assert "not quantized: lm_head (the output layer); model.embed_tokens (an embedding)" in found.err


def test_only_the_worst_of_many_layers_are_shown(anyckpt: Runner, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        f"model.layers.{n}.mlp.up_proj.weight": random.standard_normal((2, 16 + n)).astype(np.float32)
        for n in range(20)
    }
    write_folder(tmp_path / "in", {"model_type": "llama"}, arrays)
    asked = ("--to", "hf", "--quantize", "int8", "--report", tmp_path / "r.json")
    found = anyckpt("convert", tmp_path / "in", tmp_path / "q", *asked)
    assert "the 12 of 20 layers that lost most" in found.out
    assert len([line for line in found.out.splitlines() if line.startswith("model.layers.")]) == 12


def test_the_json_has_the_report(anyckpt: Runner, tmp_path: Path) -> None:
    asked = ("--to", "hf", "--quantize", "fp8", "--report", tmp_path / "r.json", "--json")
    found = anyckpt("convert", fixture_path(SOURCE), tmp_path / "q", *asked).json
    assert found["quantization"]["total"]["name"] == "total"
    assert found["quantization"]["total"]["sqnr_db"] > 30
    plain = anyckpt("convert", fixture_path(SOURCE), tmp_path / "p", "--to", "hf", "--json").json
    assert plain["quantization"] is None


def test_errors_are_one_line(anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt("convert", fixture_path(SOURCE), tmp_path / "q", "--to", "hf", "--quantize", "int3")
    assert found.code == 2
    assert found.err.startswith("error: unknown algorithm of quantization (expected fp8, fp8_per_channel")
    assert len(found.err.splitlines()) == 1


def test_inspect_says_how_a_folder_is_quantized(anyckpt: Runner, tmp_path: Path) -> None:
    lines = anyckpt("inspect", fixture_path("quant/nvfp4_b/hf")).out.splitlines()
    assert ["quantization", "modelopt", "NVFP4"] in [line.split() for line in lines]
    anyckpt("convert", fixture_path(SOURCE), tmp_path / "q", "--to", "hf", "--quantize", "int8_wo")
    lines = anyckpt("inspect", tmp_path / "q").out.splitlines()
    assert ["quantization", "compressed-tensors", "pack-quantized"] in [line.split() for line in lines]
    assert "quantization" not in anyckpt("inspect", fixture_path(SOURCE)).out


def test_the_command_quantizes_with_what_an_earlier_calibration_saw(anyckpt: Runner, tmp_path: Path) -> None:
    seen, out = tmp_path / "seen", tmp_path / "out"
    statistics_of("int4_awq_b").save(seen)
    source = fixture_path("quant/src_llama_b/hf")
    options = ("--stats", seen, "--report", tmp_path / "report.json")
    found = anyckpt("quantize", source, out, "--algorithm", "int4_awq", "--dtype", "16", *options)
    assert found.code == 0, found.err
    assert "cast float16 -> int4: 5 tensors" in found.out
    assert json.loads((out / "config.json").read_text())["quantization"]["quant_algo"] == "W4A16_AWQ"
    assert json.loads((tmp_path / "report.json").read_text())["calibration"]["modules"][0]["alphas"]
    found = anyckpt("convert", source, tmp_path / "hf", "--to", "hf", "--quantize", "int4_awq", "--stats", seen)
    assert found.code == 0, found.err
    assert (tmp_path / "hf" / "hf_quant_config.json").exists()


def test_the_command_says_what_is_missing(anyckpt: Runner, tmp_path: Path) -> None:
    source = fixture_path("quant/src_llama_b/hf")
    found = anyckpt("quantize", source, tmp_path / "out", "--algorithm", "int4_awq")
    assert found.code == 2
    assert "there is nothing to calibrate with" in found.err and "--calib-dataset" in found.err
    found = anyckpt("convert", source, tmp_path / "out", "--to", "hf", "--quantize", "int4_awq")
    assert found.code == 2
    assert "run anyckpt quantize with a text" in found.err
