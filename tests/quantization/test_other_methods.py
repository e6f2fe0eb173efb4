"""Weights of GPTQ, AWQ and bitsandbytes, and compressed-tensors' with zero points, as their own libraries dequantize.

The files in ``tests/fixtures/quant/others`` were written by GPTQModel 7.7 (``pack_original``; ``gptq`` is its first
version's form, with one taken from the words of zero points), bitsandbytes 0.50 (``Linear4bit``, ``Linear8bitLt``) and,
with random words, for AutoAWQ 0.2.9; ``expected.safetensors`` is what ``dequantize_weight``, ``dequantize_4bit``,
``int8_vectorwise_dequant`` and ``dequantize_gemm`` make of them.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.places import Log, MemoryPlace, far, files_below, registered
from tests.quantization.quantized import write_folder
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.quantization import dequantize
from anyckpt.quantization.affine import Unpacked
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor, from_array

OTHERS = fixture_path("quant/others")
CASES = sorted(folder.name for folder in OTHERS.iterdir())


def stored(case: str) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    tensors = read_safetensors(LocalFile(OTHERS / case / "model.safetensors"))[0]
    return dict(tensors), json.loads((OTHERS / case / "config.json").read_text())["quantization_config"]


def expected(case: str) -> LazyTensor:
    return read_safetensors(LocalFile(OTHERS / case / "expected.safetensors"))[0]["a.weight"]


def test_there_are_cases() -> None:
    assert {"awq", "gptq_4_act", "gptq_v2_4", "gptq_2", "nf4_nested", "fp4", "int8"} < set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_library(case: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(OTHERS / case / name, tmp_path / "in" / name)
    want = expected(case)
    done = anyckpt.convert(tmp_path / "in", tmp_path / "out", to="safetensors", dtype=want.dtype.name)
    found = anyckpt.open(tmp_path / "out").weights()
    assert found.keys() == {"a.weight"}
    assert found["a.weight"].shape == want.shape
    np.testing.assert_array_equal(found["a.weight"].numpy(), want.numpy())
    assert sum(done.casts.values()) == 1
    assert set(done.ignored.values()) <= {"says how a weight was quantized, which its numbers have"}


@pytest.mark.parametrize("case", ["gptq_4_act", "awq", "nf4_nested", "int8"])
def test_numbers_are_the_same_from_afar(case: str) -> None:
    with registered("far", MemoryPlace("far://model", files_below(OTHERS / case), far(Log()))):
        source = dequantize(anyckpt.open("far://model/model.safetensors").weights(), stored(case)[1], "float32", "x")
        found = np.empty(source.tensors["a.weight"].size, np.uint32)
        source.tensors["a.weight"].fill(0, found)
    want = dequantize(stored(case)[0], stored(case)[1], "float32", "x").tensors["a.weight"].numpy()
    np.testing.assert_array_equal(found.view(np.float32).reshape(want.shape), want)


@pytest.mark.parametrize("case", CASES)
def test_any_box_is_that_of_the_whole(case: str) -> None:
    tensors, facts = stored(case)
    whole = expected(case)
    weight = dequantize(tensors, facts, whole.dtype.name, "x").tensors["a.weight"]
    again = pickle.loads(pickle.dumps(weight))
    full = whole.numpy()
    for rows, columns in ((slice(0, 24), slice(5, 6)), (slice(3, 11), slice(1, 60)), (slice(23, 24), slice(0, 64))):
        for tensor in (weight, again):
            np.testing.assert_array_equal(tensor[rows, columns].numpy(), full[rows, columns])
    np.testing.assert_array_equal(weight.T[7:13, 2:5].numpy(), full.T[7:13, 2:5])
    part = np.empty(101, weight.dtype.raw)
    weight.read_flat(77, part)
    np.testing.assert_array_equal(part.view(weight.dtype.numpy), full.reshape(-1)[77:178])


@pytest.mark.parametrize(("case", "file"), [("gptq_4_act", "quantize_config.json"), ("awq", "quant_config.json")])
def test_older_releases_say_it_in_a_file_of_their_own(case: str, file: str, tmp_path: Path) -> None:
    facts = json.loads((OTHERS / case / "config.json").read_text())["quantization_config"]
    facts.pop("quant_method")
    if case == "awq":
        facts = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "in").mkdir()
    shutil.copy(OTHERS / case / "model.safetensors", tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "in" / file).write_text(json.dumps(facts))
    anyckpt.convert(tmp_path / "in", tmp_path / "out", to="safetensors", dtype="fp16")
    np.testing.assert_array_equal(anyckpt.open(tmp_path / "out").weights()["a.weight"].numpy(), expected(case).numpy())


def words(order: tuple[int, ...] | None, bits: int) -> LazyTensor:
    random = np.random.default_rng(3)
    return Unpacked(
        from_array(random.integers(-(1 << 31), 1 << 31, (5, 6), dtype=np.int64).astype(np.int32)), 1, bits, order
    )


@pytest.mark.parametrize(("order", "bits"), [(None, 4), (None, 8), ((0, 4, 1, 5, 2, 6, 3, 7), 4), (None, 2)])
def test_codes_of_words_from_anywhere(order: tuple[int, ...] | None, bits: int) -> None:
    tensor = words(order, bits)
    raw = tensor.child.numpy().view(np.uint32)  # type: ignore[attr-defined]
    each = 32 // bits
    places = order or tuple(range(each))
    fields = np.stack([raw >> np.uint32(place * bits) & np.uint32((1 << bits) - 1) for place in places], axis=-1)
    full = fields.reshape(5, 6 * each).astype(np.uint8)
    np.testing.assert_array_equal(tensor.numpy(), full)
    for start in range(0, 6 * each, 3):
        for stop in range(start + 1, 6 * each + 1, 5):
            np.testing.assert_array_equal(tensor[1:4, start:stop].numpy(), full[1:4, start:stop])


@pytest.mark.parametrize("case", ["gptq_4", "awq", "nf4", "int8"])
def test_scales_that_cannot_be_are_found(case: str, tmp_path: Path) -> None:
    shutil.copytree(OTHERS / case, tmp_path / "in", ignore=shutil.ignore_patterns("expected*"))
    assert not anyckpt.verify(tmp_path / "in", deep=True).problems
    tensors, facts = stored(case)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    name = next(f"a.{part}" for part in ("scales", "weight.absmax", "SCB") if f"a.{part}" in arrays)
    arrays[name] = np.where(np.arange(arrays[name].size).reshape(arrays[name].shape) == 3, np.nan, arrays[name]).astype(
        arrays[name].dtype
    )
    write_folder(tmp_path / "bad", {"model_type": "x", "quantization_config": facts}, arrays)
    problems = anyckpt.verify(tmp_path / "bad", deep=True).problems
    assert any(problem.where == name and "1 of" in problem.problem for problem in problems), problems


# -- damage ---------------------------------------------------------------------------------------------------


STATE = "weight.quant_state.bitsandbytes__nf4"


def change(case: str, **arrays: Any) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    tensors, facts = stored(case)
    for name, array in arrays.items():
        key = f"a.{STATE if name == 'state' else name.replace('__', '.')}"
        if array is None:
            del tensors[key]
        else:
            tensors[key] = from_array(array)
    return tensors, facts


@pytest.mark.parametrize(
    ("case", "arrays", "problem"),
    [
        ("gptq_4", {"scales": np.ones((2, 7), np.float16)}, "scales does not fit"),
        ("gptq_4", {"qzeros": np.ones((2, 7), np.int32)}, "qzeros does not fit"),
        ("gptq_4", {"qzeros": None}, "part of a quantized weight whose other parts are missing"),
        ("gptq_4_act", {"g_idx": np.zeros(3, np.int32)}, "g_idx does not fit"),
        ("gptq_4_act", {"g_idx": np.zeros(64, np.float32)}, "g_idx does not fit"),
        ("awq", {"qzeros": None}, "part of a quantized weight whose other parts are missing"),
        ("awq", {"scales": np.ones((2, 23), np.float16)}, "scales does not fit"),
        ("nf4", {"weight__absmax": np.ones(3, np.float32)}, "weight.absmax does not fit"),
        ("nf4", {"weight__quant_map": np.ones(3, np.float32)}, "weight.quant_map does not fit"),
        ("nf4", {"weight": np.ones((3, 1), np.uint8)}, "weight does not fit"),
        ("nf4", {"state": np.ones(3, np.uint8)}, "JSON with shape and blocksize"),
        ("nf4_nested", {"weight__nested_quant_map": None}, "nested_quant_map does not fit"),
        ("int8", {"SCB": np.ones(3, np.float32)}, "SCB does not fit"),
        ("int8", {"weight_format": np.ones((), np.uint8)}, "rows as they are"),
        ("int8", {"SCB": None}, "quantized weight without scales"),
    ],
)
def test_damage_is_named(case: str, arrays: dict[str, Any], problem: str) -> None:
    tensors, facts = change(case, **arrays)
    with pytest.raises(MappingError, match=problem) as caught:
        dequantize(tensors, facts, "float16", "here")
    assert str(caught.value).startswith("here: tensor 'a.")


def test_groups_that_do_not_exist_are_found_when_read() -> None:
    tensors, facts = change("gptq_4_act", g_idx=np.full(64, 2, np.int32))
    weight = dequantize(tensors, facts, "float16", "here").tensors["a.weight"]
    with pytest.raises(MappingError, match=r"groups that do not exist.*0 to 1.*found 2 to 2"):
        weight.numpy()


@pytest.mark.parametrize(
    "state",
    [
        {"shape": [24, 200], "blocksize": 0},
        {"shape": [24, -200], "blocksize": 64},
        {"shape": 7, "blocksize": 64},
        {"shape": [True, 4], "blocksize": 64},
        {"shape": [24, 200], "blocksize": 64, "nested_offset": float("nan")},
        [],
    ],
)
def test_states_that_are_not_possible(state: Any) -> None:
    blob = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors, facts = change("nf4", state=blob)
    with pytest.raises(MappingError, match="JSON with shape and blocksize"):
        dequantize(tensors, facts, "float16", "here")


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4.0},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    ],
)
def test_other_forms_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path / "in", {"quantization_config": facts}, {"a.qweight": np.ones((8, 8), np.int32)})
    with pytest.raises(MappingError, match="not understood.*gptq"):
        anyckpt.convert(tmp_path / "in", tmp_path / "x", to="safetensors", dtype="bf16")


# -- ModelOpt's integers --------------------------------------------------------------------------------------


def test_integers_of_modelopt_with_numbers_of_inputs() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (6, 64), dtype=np.int8)
    pairs = ((codes[::2] & 15) | (codes[1::2] << 4)).view(np.uint8)
    scales = random.random((6, 2), dtype=np.float32)
    inputs = random.random(64, dtype=np.float32)
    facts = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}
    tensors = {"a.weight": from_array(pairs), "a.weight_scale": from_array(scales)}
    plain = codes * np.repeat(scales, 32, axis=1)
    found = dequantize(tensors, facts, "float32", "x")
    np.testing.assert_array_equal(found.tensors["a.weight"].numpy(), plain)
    tensors["a.pre_quant_scale"] = from_array(inputs)
    again = dequantize(tensors, facts, "float32", "x")
    assert again.tensors.keys() == {"a.weight"}
    np.testing.assert_array_equal(again.tensors["a.weight"].numpy(), plain * inputs)
    assert again.casts == {"int4 -> float32": 1}


def test_types_of_parts_do_not_matter() -> None:
    tensors, facts = change("gptq_4", scales=stored("gptq_4")[0]["a.scales"].numpy().astype(np.float32))
    whole = dequantize(tensors, facts, "float16", "x").tensors["a.weight"]
    assert whole.dtype == dtype("float16")
    np.testing.assert_array_equal(whole.numpy(), expected("gptq_4").numpy())
