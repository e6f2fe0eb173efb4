"""What the report says of quantized weights, held against numpy's account of the same files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.quantization.quantized import write_folder
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import OutputError, UsageError

SOURCE = "quant/src_llama_a/hf"


def numbers(folder: Path, out: Path) -> dict[str, Any]:
    anyckpt.convert(folder, out, to="safetensors", dtype="fp32")
    return {name: tensor.numpy().astype(np.float64) for name, tensor in anyckpt.open(out).weights().items()}


@pytest.mark.parametrize(
    ("algorithm", "form"),
    [
        ("fp8", "compressed-tensors"),
        ("fp8", "modelopt"),
        ("fp8_blocks", "fp8"),
        ("int8", None),
        ("int8_wo", None),
        ("int4", None),
        ("nvfp4", "modelopt"),
        ("nvfp4", None),
        ("mxfp4", None),
    ],
)
def test_it_is_what_the_files_say(algorithm: str, form: str | None, tmp_path: Path) -> None:
    source = fixture_path(SOURCE)
    group = 32 if algorithm == "int4" else None
    options: dict[str, Any] = {"quantize": algorithm, "quantize_form": form, "group_size": group}
    done = anyckpt.convert(source, tmp_path / "q", to="hf", report=tmp_path / "r.json", **options)
    report = json.loads((tmp_path / "r.json").read_text())
    assert done.quantization == report
    assert done.to_json()["quantization"] == report
    before, after = numbers(source, tmp_path / "b"), numbers(tmp_path / "q", tmp_path / "a")
    stored = anyckpt.open(tmp_path / "q").weights()
    assert len(report["weights"]) == 14
    for one in report["weights"]:
        name = one["name"]
        gap = before[name] - after[name]
        assert one["sqnr_db"] == pytest.approx(10 * math.log10((before[name] ** 2).sum() / (gap**2).sum()), abs=1e-3)
        assert one["max_error"] == pytest.approx(np.abs(gap).max(), rel=1e-5)
        assert one["bytes_before"] == 2 * before[name].size
        stem = name.removesuffix("weight")
        assert one["bytes_after"] == sum(t.nbytes for part, t in stored.items() if part.startswith(stem))
        assert (one["saturated"] == 0) == (algorithm != "int4"), one
    assert [one["name"] for one in report["layers"]] == ["model.layers.0", "model.layers.1"]
    total = report["total"]
    assert total["elements"] == sum(one["elements"] for one in report["weights"])
    assert total["max_error"] == max(one["max_error"] for one in report["layers"])
    assert {"name": "lm_head", "reason": "the output layer"} in report["not_quantized"]


def test_what_is_beyond_the_codes_is_counted(tmp_path: Path) -> None:
    """With 7.5 steps to the largest magnitude, it has no code if it is positive, and has one if it is negative."""
    weight = np.tile(np.array([7.6, *[0.0] * 15, -7.6, *[0.0] * 15], np.float32), (4, 1))
    write_folder(tmp_path / "in", {"model_type": "llama"}, {"model.layers.0.mlp.down_proj.weight": weight})
    options: dict[str, Any] = {"quantize": "int4", "group_size": 16, "dtype": "bf16"}
    done = anyckpt.convert(tmp_path / "in", tmp_path / "q", to="hf", report=tmp_path / "r.json", **options)
    assert done.quantization is not None
    found = done.quantization["total"]["saturated"]
    scale = float(anyckpt.open(tmp_path / "q").weights()["model.layers.0.mlp.down_proj.weight_scale"].numpy()[0, 0])
    assert found == (4 if 7.59375 / scale > 7.5 else 0)


def test_what_is_beyond_mxfp4_is_counted(tmp_path: Path) -> None:
    """6 times the largest power of two is infinite in bfloat16, so that 1.5 times that power is the largest number."""
    weight = np.tile(np.array([3.3e38, *[1e38] * 31], np.float32), (4, 1)).astype(ml_dtypes.bfloat16)
    write_folder(tmp_path / "in", {"model_type": "llama"}, {"model.layers.0.mlp.down_proj.weight": weight})
    done = anyckpt.convert(tmp_path / "in", tmp_path / "q", to="hf", quantize="mxfp4", report=tmp_path / "r.json")
    assert done.quantization is not None
    assert done.quantization["total"]["saturated"] == 4
    assert 0 < done.quantization["total"]["sqnr_db"] < 100
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="bf16")
    back = anyckpt.open(tmp_path / "back").weights()["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(back.astype(np.float64)[:, 0], 1.5 * 2.0**127)


def test_it_can_be_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantize": "nvfp4", "dry_run": True}
    done = anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", report=tmp_path / "r.json", **options)
    assert done.quantization is not None
    assert 15 < done.quantization["total"]["sqnr_db"] < 25
    assert not (tmp_path / "q").exists()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.asked: list[str] = []
        self.tags: set[str] = set()
        self.scripts: list[str] = []
        self.open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open = tag
        self.asked += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open == "script" else self.text).append(data)


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    name = "model.layers.0.<script>alert(1)</script>.weight"
    array = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    layers = {f"model.layers.{n}.mlp.up_proj.weight": array for n in range(3)}
    write_folder(tmp_path / "in", {"model_type": "llama"}, {name: array, **layers})
    anyckpt.convert(tmp_path / "in", tmp_path / "q", to="hf", quantize="fp8", report=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    parsed = Tags()
    parsed.feed(text)
    assert all(asked.startswith("#") or asked == "data:," for asked in parsed.asked)
    assert "default-src 'none'" in text
    assert not any("alert" in script for script in parsed.scripts)
    assert {"svg", "polyline", "table"} <= parsed.tags
    assert any("4 weights as fp8" in piece and "dB overall" in piece for piece in parsed.text)
    assert name in parsed.text
    assert {"plot", "layers", "weights"} <= set(re.findall(r'<section id="(\w+)"', text))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--report means nothing without --quantize"):
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", report="r.json")
    with pytest.raises(OutputError, match="cannot be written"):
        report = tmp_path / "no" / "r.json"
        anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", quantize="fp8", report=report)
