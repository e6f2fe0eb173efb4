"""Weights that MLX quantized, as MLX itself makes numbers of them.

The files in ``tests/fixtures/quant/mlx`` were written by MLX 0.32.4 on a CPU: ``model.safetensors`` is what
``quantize`` made of random numbers, ``expected.safetensors`` what ``dequantize`` made of that.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.quantization.quantized import write_folder
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.errors import MappingError
from anyckpt.quantization import dequantize
from anyckpt.quantization.affine import RunningBits
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor, from_array

OURS = fixture_path("quant/mlx")
CASES = sorted(folder.name for folder in OURS.iterdir())


def stored(case: str) -> dict[str, LazyTensor]:
    return dict(read_safetensors(LocalFile(OURS / case / "model.safetensors"))[0])


def expected(case: str) -> LazyTensor:
    return read_safetensors(LocalFile(OURS / case / "expected.safetensors"))[0]["a.weight"]


def facts(case: str) -> dict[str, Any]:
    return {"quant_method": "mlx", **json.loads((OURS / case / "config.json").read_text())["quantization"]}


def test_there_are_cases() -> None:
    assert {"1", "2", "3", "4", "4_experts", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4"} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_mlx(case: str, tmp_path: Path) -> None:
    want = expected(case)
    done = anyckpt.convert(OURS / case / "model.safetensors", tmp_path / "plain", to="safetensors")
    assert not done.casts
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(OURS / case / name, tmp_path / "in" / name)
    assert anyckpt.inspect(tmp_path / "in").details["quantization"].startswith("mlx")
    done = anyckpt.convert(tmp_path / "in", tmp_path / "out", to="safetensors", dtype=want.dtype.name)
    found = anyckpt.open(tmp_path / "out").weights()
    assert found.keys() == {"a.weight"}
    np.testing.assert_array_equal(found["a.weight"].numpy(), want.numpy())
    assert sum(done.casts.values()) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case != "4_experts"])
def test_any_box_is_that_of_the_whole(case: str) -> None:
    full = expected(case).numpy()
    weight = dequantize(stored(case), facts(case), expected(case).dtype.name, "x").tensors["a.weight"]
    for tensor in (weight, pickle.loads(pickle.dumps(weight))):
        for rows, columns in ((slice(0, 24), slice(5, 6)), (slice(3, 11), slice(1, 60)), (slice(23, 24), slice(0, 64))):
            np.testing.assert_array_equal(tensor[rows, columns].numpy(), full[rows, columns])
    np.testing.assert_array_equal(weight.T[7:13, 2:5].numpy(), full.T[7:13, 2:5])


@given(st.sampled_from([3, 5, 6, 7]), st.integers(1, 4), st.data())
def test_running_bits_are_read_from_anywhere(bits: int, eights: int, data: st.DataObject) -> None:
    raw = np.random.default_rng(bits).integers(0, 256, (3, bits * eights), dtype=np.uint8)
    ones = np.unpackbits(raw, axis=1, bitorder="little").reshape(3, 8 * eights, bits)
    full = (ones * (1 << np.arange(bits))).sum(axis=-1).astype(np.uint8)
    begin = data.draw(st.integers(0, 8 * eights - 1))
    end = data.draw(st.integers(begin + 1, 8 * eights))
    codes = RunningBits(from_array(raw), bits)
    np.testing.assert_array_equal(codes[1:, begin:end].numpy(), full[1:, begin:end])


def test_modules_may_be_quantized_in_ways_of_their_own(tmp_path: Path) -> None:
    arrays = {}
    for module, case in (("a", "mxfp4"), ("b", "8"), ("c.deep", "6")):
        arrays |= {name.replace("a.", f"{module}.", 1): tensor.numpy() for name, tensor in stored(case).items()}
    arrays["norm.weight"] = np.ones(4, np.float32)
    own = {"bits": 4, "group_size": 32, "mode": "mxfp4", "norm": False}
    own |= {"b": {"bits": 8}, "c.deep": {"bits": 6, "group_size": 64}}
    write_folder(tmp_path / "in", {"model_type": "x", "quantization": own, "quantization_config": own}, arrays)
    anyckpt.convert(tmp_path / "in", tmp_path / "out", to="hf", dtype="float32")
    found = anyckpt.open(tmp_path / "out")
    assert not {"quantization", "quantization_config"} & found.config.keys()
    for module, case in (("a", "mxfp4"), ("b", "8"), ("c.deep", "6")):
        np.testing.assert_array_equal(
            found.weights()[f"{module}.weight"].numpy(), expected(case).numpy().astype(np.float32)
        )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bits": 7}, "MLX does not quantize so"),
        ({"bits": "4"}, "bits is not possible"),
        ({"group_size": 48}, "does not fit the weight's codes"),
        ({"mode": "nvfp4"}, "MLX does not quantize so"),
        ({"bits": 8}, "does not fit the weight's codes"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        dequantize(stored("4"), {**facts("4"), **change}, "float32", "x")


@pytest.mark.parametrize("missing", ["a.scales", "a.biases", "a.weight"])
def test_missing_parts_are_named(missing: str) -> None:
    tensors = {name: tensor for name, tensor in stored("4").items() if name != missing}
    with pytest.raises(MappingError, match="part of a quantized weight whose other parts are missing"):
        dequantize(tensors, facts("4"), "float32", "x")


@pytest.mark.parametrize(("family", "block"), [("qwen3_moe", "mlp"), ("mixtral", "block_sparse_moe")])
def test_stacked_experts_under_their_names_in_mlx_lm(family: str, block: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{family}/hf")
    tensors = anyckpt.open(source).weights()
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    arrays: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(f".{block}.experts.")
        if rest:
            number, part, _ = rest.split(".")
            stacked = f"{layer}.{block}.switch_mlp.{names.get(part, part)}.weight"
            arrays.setdefault(stacked, {})[int(number)] = tensor.numpy()
        else:
            arrays[name] = tensor.numpy()
    arrays = {
        name: np.stack([array[number] for number in sorted(array)]) if isinstance(array, dict) else array
        for name, array in arrays.items()
    }
    write_folder(tmp_path / "in", json.loads((Path(source) / "config.json").read_text()), arrays)
    anyckpt.convert(tmp_path / "in", tmp_path / "nemo", to="megatron-core")
    anyckpt.convert(tmp_path / "nemo", tmp_path / "out", to="hf")
    assert anyckpt.diff(source, tmp_path / "out").equal
