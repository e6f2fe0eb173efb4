"""Quantized folders in full precision, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.quantization.quantized import FP8, MXFP4, Arrays, as_fp8, fp8_blocks, mxfp4, quantized, write_folder
from tests.support import expected_of, fixture_path, sha256_of

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import OutputFile, Plan, TensorData
from anyckpt.errors import MappingError
from anyckpt.quantization import METHODS, dequantize, method_of
from anyckpt.quantization.numbers import e2m1
from anyckpt.storage import LocalFile
from anyckpt.tensor import from_array

SOURCE = "quant/src_llama_b/hf"

Change = Callable[[Arrays], object]


def arrays(folder: Path) -> Arrays:
    return {
        name: tensor.numpy() for name, tensor in read_safetensors(LocalFile(folder / "model.safetensors"))[0].items()
    }


def spread(scales: np.ndarray[Any, Any], shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


def close(found: np.ndarray[Any, Any], original: np.ndarray[Any, Any], digits: int) -> bool:
    """Within the rounding of numbers of so many binary digits, and not the same."""
    found, original = found.astype(np.float64), original.astype(np.float64)
    worst = np.abs(original) * 2.0**-digits + np.abs(original).max() * 2.0 ** (-digits - 2)
    return bool((np.abs(found - original) <= worst).all() and (found != original).any())


def test_deepseeks_blocks_through_megatron(tmp_path: Path) -> None:
    """Equal to numpy's product of codes and scales, for blocks that are cut short at both ends (16 by 16 here)."""
    plain = fixture_path("families/deepseek_v3/hf")
    facts = {**FP8, "weight_block_size": [16, 16]}
    folder = quantized(plain, tmp_path / "fp8", facts, as_fp8(16))
    done = anyckpt.convert(folder, tmp_path / "megatron", to="megatron-core", dtype="bf16")
    assert any("quantized (fp8) and are written as bfloat16" in note for note in done.notes)
    anyckpt.convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    stored, found, original = arrays(folder), arrays(tmp_path / "back"), arrays(plain)
    assert found.keys() == original.keys()
    for name, array in found.items():
        codes, scales = stored[name], stored.get(f"{name}_scale_inv")
        if scales is not None:
            codes = (codes.astype(np.float32) * spread(scales, codes.shape, (16, 16))).astype(ml_dtypes.bfloat16)
            assert close(array, original[name], 4), name
        assert array.tobytes() == codes.tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    count = sum(name.endswith("_scale_inv") for name in stored)
    assert done.casts == {"float8_e4m3fn -> bfloat16": count}
    assert not any("scale" in name for name in done.ignored)


def gpt_oss(folder: Path) -> Path:
    """A model as wide as its experts, with random weights under the names of its family."""
    config = json.loads((fixture_path("families/gpt_oss/hf") / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64}
    model = models.identify(Checkpoint("x", "hf", {}, config=config, config_kind="hf"))
    assert model is not None
    generator = np.random.default_rng(6)
    hub = {
        item.hub: from_array(generator.normal(size=item.shape).astype(ml_dtypes.bfloat16))
        for item in model.definition.expected(model.config)
    }
    named = models.from_hub(models.Hub(model, hub), "hf").tensors
    return write_folder(folder, config, {name: tensor.numpy() for name, tensor in named.items()})


@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32"])
def test_gpt_oss_experts_through_megatron(to: str, tmp_path: Path) -> None:
    """Codes are of the transposed matrix, and come back as (in, out), as the bf16 files have them."""
    plain = gpt_oss(tmp_path / "plain")
    folder = quantized(plain, tmp_path / "mxfp4", MXFP4, mxfp4)
    done = anyckpt.convert(folder, tmp_path / "megatron", to="megatron-core", dtype=to)
    assert any("float16 ends at 65,504" in note for note in done.notes) == (to == "fp16")
    anyckpt.convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    stored, found, original = arrays(folder), arrays(tmp_path / "back"), arrays(plain)
    assert found.keys() == original.keys()
    kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[to]
    for name, array in found.items():
        if name.endswith("_proj") and ".experts." in name:
            packed, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            numbers = e2m1()[np.stack([packed & 15, packed >> 4], -1)] * 2.0 ** (scales - 127.0)[..., None, None]
            expected = numbers.reshape(*numbers.shape[:2], -1).transpose(0, 2, 1)
            assert array.tobytes() == expected.astype(kind).tobytes(), name
            assert close(array, original[name], 2), name
        else:
            assert array.tobytes() == stored[name].astype(kind).tobytes(), name


def test_without_a_type_files_are_copied_or_refused(tmp_path: Path) -> None:
    folder = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "fp8", FP8, as_fp8())
    for target in ("megatron-core", "nemo2", "megatron-lm"):
        with pytest.raises(MappingError, match=r"the model is quantized.*found fp8.*--dtype bf16"):
            anyckpt.convert(folder, tmp_path / target, to=target)
    anyckpt.convert(folder, tmp_path / "copy", to="hf")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"] == FP8
    assert arrays(tmp_path / "copy").keys() == arrays(folder).keys()
    anyckpt.convert(folder, tmp_path / "bare.safetensors", to="safetensors")
    again = read_safetensors(LocalFile(tmp_path / "bare.safetensors"))[0]
    assert {tensor.dtype.name for tensor in again.values()} >= {"float8_e4m3fn", "bfloat16"}


def test_modelopts_nvfp4(tmp_path: Path) -> None:
    """A folder that NVIDIA ModelOpt 0.40 wrote, by the arithmetic of its ``NVFP4QTensor.dequantize``."""
    source = fixture_path("quant/nvfp4_b/hf")
    done = anyckpt.convert(source, tmp_path / "out", to="hf", dtype="fp32")
    stored, found, original = arrays(source), arrays(tmp_path / "out"), arrays(fixture_path(SOURCE))
    assert found.keys() == original.keys()
    quantized_names = [name for name in found if f"{name}_scale" in stored]
    assert len(quantized_names) == 7
    for name in quantized_names:
        packed, scales, common = stored[name], stored[f"{name}_scale"], stored[f"{name}_scale_2"]
        both = scales.astype(np.float32) * common
        numbers = e2m1()[np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)]
        assert found[name].tobytes() == (numbers * spread(both, numbers.shape, (1, 16))).tobytes(), name
        assert close(found[name], original[name], 2), name
    assert done.casts["float4_e2m1 -> float32"] == 7
    assert sum(name.endswith("input_scale") for name in done.ignored) == 7
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    anyckpt.convert(source, tmp_path / "copy", to="hf")
    assert (tmp_path / "copy" / "hf_quant_config.json").exists()


def test_modelopt_says_so_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Older releases write no ``quantization_config``."""
    source = fixture_path("quant/nvfp4_b/hf")
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("model.safetensors", "hf_quant_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MappingError, match=r"the model is quantized.*found modelopt NVFP4"):
        anyckpt.convert(folder, tmp_path / "x", to="nemo2")
    anyckpt.convert(folder, tmp_path / "one", to="hf", dtype="bf16")
    anyckpt.convert(source, tmp_path / "two", to="hf", dtype="bf16")
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in two.items()}


def test_modelopts_blocks(tmp_path: Path) -> None:
    """The bytes that ModelOpt 0.40 wrote, made again and told by their digests: query, key and value share a scale."""
    files = expected_of("quant/block_fp8_b")["variants"]["hf"]["files"]
    expected, config = files["model.safetensors"]["tensors"], files["config.json"]
    original = arrays(fixture_path(SOURCE))
    attention = [float(np.abs(original[f"model.layers.0.self_attn.{x}_proj.weight"]).max()) for x in "qkv"]
    codes_of = {
        name: fp8_blocks(array.astype(np.float32), peak=max(attention) if name.split(".")[-2][0] in "qkv" else 0.0)
        for name, array in original.items()
        if f"{name}_scale" in expected
    }

    def each(name: str, weight: np.ndarray[Any, Any]) -> Arrays:
        if name not in codes_of:
            return {name: weight}
        codes, scales = codes_of[name]
        return {name: codes, f"{name}_scale": scales.reshape(expected[f"{name}_scale"]["shape"])}

    facts = config["quantization_config"]
    folder = quantized(fixture_path(SOURCE), tmp_path / "blocks", facts, each)
    made = read_safetensors(LocalFile(folder / "model.safetensors"))[0]
    assert {name: sha256_of(tensor) for name, tensor in made.items()} == {n: f["sha256"] for n, f in expected.items()}
    anyckpt.convert(folder, tmp_path / "out", to="megatron-core", dtype="fp32")
    anyckpt.convert(tmp_path / "out", tmp_path / "back", to="hf")
    found = arrays(tmp_path / "back")
    assert found.keys() == original.keys()
    for name, array in found.items():
        if name in codes_of:
            codes, scales = codes_of[name]
            assert array.tobytes() == (codes.astype(np.float32) * spread(scales, codes.shape, (128, 128))).tobytes()
            assert close(array, original[name], 4), name


CODES = np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
ROWS = np.array([1.0, 2.0, 0.3], np.float32)


@pytest.mark.parametrize(
    ("facts", "scale", "values", "factors"),
    [
        ({"quant_method": "fp8", "weight_block_size": None}, "_scale_inv", np.float32(0.7), 0.7),
        ({"quant_method": "fp8"}, "_scale_inv", np.full((1, 1), 0.7, np.float32), 0.7),
        ({"quant_method": "fp8", "weight_block_size": [1, 4]}, "_scale_inv", np.uint8([[127], [128], [126]]),
         [1, 2, 0.5]),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", np.float32(0.7), 0.7),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "_scale", ROWS, ROWS),
        ({"quant_method": "fbgemm_fp8"}, "_scale", ROWS[:, None], ROWS),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "_scale",
         ROWS[:, None].astype(ml_dtypes.bfloat16), ROWS.astype(ml_dtypes.bfloat16)),
        ({"quant_method": "compressed-tensors", "format": "float-quantized",
          "config_groups": {"group_0": {"weights": {"block_structure": [2, 4]}}}}, "_scale",
         np.float32([[1.5], [0.7]]), [1.5, 1.5, 0.7]),
    ],
)  # fmt: skip
def test_one_scale_rows_and_blocks(facts: Any, scale: str, values: Any, factors: Any, tmp_path: Path) -> None:
    tensors = {"a.weight": CODES, f"a.weight{scale}": np.asarray(values), "a.input_scale": np.float32([1.0])}
    folder = write_folder(tmp_path / "in", {"quantization_config": facts, "model_type": "x"}, tensors)
    done = anyckpt.convert(folder, tmp_path / "out.safetensors", to="safetensors", dtype="fp32")
    found = read_safetensors(LocalFile(tmp_path / "out.safetensors"))[0]
    expected = CODES.astype(np.float32) * np.asarray(factors, dtype=np.float32).reshape(-1, 1)
    np.testing.assert_array_equal(found["a.weight"].numpy(), expected)
    assert found.keys() == {"a.weight"}
    assert "activation" in done.ignored["a.input_scale"]


def int4_facts(**weights: Any) -> dict[str, Any]:
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 8, **weights}
    groups = {"group_0": {"weights": settings}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def int4() -> Arrays:
    """Three rows of twenty codes, the first in the lowest bits, in 32-bit words whose last one is half full."""
    codes = np.arange(60).reshape(3, 20) % 16
    words = np.zeros((3, 3), np.uint32)
    for column in range(20):
        words[:, column // 8] |= (codes[:, column] << 4 * (column % 8)).astype(np.uint32)
    return {
        "a.weight_packed": words.view(np.int32), "a.weight_shape": np.array([3, 20]),
        "a.weight_scale": np.array([[0.5, 1, 2]] * 3, np.float32),
    }  # fmt: skip


def test_four_bits_in_words(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", {"quantization_config": int4_facts(), "model_type": "x"}, int4())
    done = anyckpt.convert(folder, tmp_path / "out.safetensors", to="safetensors", dtype="fp32")
    found = read_safetensors(LocalFile(tmp_path / "out.safetensors"))[0]
    expected = (np.arange(60).reshape(3, 20) % 16 - 8) * np.repeat([0.5, 1, 2], 8)[:20]
    np.testing.assert_array_equal(found["a.weight"].numpy(), expected.astype(np.float32))
    assert found.keys() == {"a.weight"}
    assert done.casts == {"int4 -> float32": 1}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("a.weight_shape"), "packed codes are not those of a weight"),
        (
            lambda t: t.update({"a.weight_shape": np.array([3, 25])}),
            "packed codes are not.*found .* codes of .3, 25.",
        ),
        (lambda t: t.update({"a.weight_shape": np.array([3, -20])}), "packed codes are not those of a weight"),
        (lambda t: t.update({"a.weight_shape": np.array([60])}), "packed codes are not those of a weight"),
        (lambda t: t.update({"a.weight_shape": np.array([3.0, 20.0])}), "packed codes are not those of a weight"),
        (lambda t: t.update({"a.weight_zero_point": np.zeros((1, 3), np.int32)}), "more than codes times scales"),
        (lambda t: t.update({"a.weight_g_idx": np.zeros(20, np.int32)}), "'a.weight_g_idx': is of a quantized weight"),
        (lambda t: t.pop("a.weight_scale"), "'a.weight_packed': is part of a quantized weight"),
    ],
)
def test_words_that_do_not_fit_are_named(change: Change, problem: str, tmp_path: Path) -> None:
    tensors = int4()
    change(tensors)
    refused(tmp_path / "in", {"quantization_config": int4_facts()}, tensors, problem)


@pytest.mark.parametrize(
    "facts",
    [
        int4_facts(num_bits=3),
        {**int4_facts(type="int", num_bits=8, symmetric=False), "format": "int-quantized"},
        int4_facts(type="float"),
        {**int4_facts(), "format": "marlin-24"},
        {**int4_facts(), "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
    ],
)
def test_other_variants_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    refused(tmp_path / "in", {"quantization_config": facts}, int4(), "not understood.*found compressed-tensors")


def refused(folder: Path, config: Mapping[str, Any], tensors: Arrays, problem: str) -> None:
    write_folder(folder, {"model_type": "x", **config}, tensors)
    with pytest.raises(MappingError, match=problem) as caught:
        anyckpt.convert(folder, folder.with_name("out"), to="safetensors", dtype="bf16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"quant_method": "aqlm", "bits": 4}, "aqlm"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq gemv"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16"}, "modelopt W4A16"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        ({"quant_method": ["fp8"]}, "one without quant_method"),
        ({}, "one without quant_method"),
    ],
)
def test_unknown_methods_are_named(facts: dict[str, Any], found: str, tmp_path: Path) -> None:
    assert method_of(facts) == found
    refused(tmp_path / "in", {"quantization_config": facts}, {"a.weight": CODES}, f"not understood.*found {found}")
    with pytest.raises(MappingError, match=f"not understood.*found {found}"):
        anyckpt.convert(tmp_path / "in", tmp_path / "x", to="megatron-core")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("a.weight_scale_inv"), "tensor 'a.weight': is a quantized weight without scales"),
        (lambda t: t.pop("a.weight"), "'a.weight_scale_inv': is part of a quantized weight"),
        (lambda t: t.update({"a.weight": CODES.astype(np.float32)}), "'a.weight_scale_inv': is part of a quantized"),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((2, 4), np.float32)}), "scales do not fit.*found .2, 4."),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((4, 3), np.float32)}), "scales do not fit"),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((2, 2), np.int64)}), "scales have no such type.*int64"),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((0,), np.float32)}), "scales do not fit"),
        (lambda t: t.update({"b.weight": CODES}), "tensor 'b.weight': is a quantized weight without scales"),
        (lambda t: t.update({"b.weight": np.ones(3, np.uint8)}), "tensor 'b.weight': is a quantized weight without"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: Change, problem: str, tmp_path: Path) -> None:
    tensors = {"a.weight": CODES, "a.weight_scale_inv": np.ones((2, 2), np.float32)}
    facts = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    change(tensors)
    refused(tmp_path / "in", facts, tensors, problem)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("m.down_proj_scales"), "'m.down_proj_blocks': is part of a quantized weight"),
        (lambda t: t.pop("m.down_proj_blocks"), "'m.down_proj_scales': is part of a quantized weight"),
        (lambda t: t.update({"m.down_proj_blocks": np.ones((2, 8), np.uint8)}), "is not blocks of a quantized weight"),
        (
            lambda t: t.update(
                {"m.down_proj_blocks": np.ones((2, 8, 1, 8), np.uint8), "m.down_proj_scales": np.ones((2, 8, 1), "u1")}
            ),
            "is not blocks of a quantized weight .*16 bytes of a block",
        ),
        (lambda t: t.update({"m.down_proj_scales": np.ones((2, 8, 3), np.uint8)}), "scales do not fit"),
        (
            lambda t: t.update({"m.down_proj_scales": np.ones((2, 8, 2), np.float32)}),
            "scales have no such type .*expected float8_e8m0fnu, uint8, found float32",
        ),
        (lambda t: t.update({"m.down_proj_blocks": np.ones((2, 8, 2, 16), np.float32)}), "part of a quantized weight"),
    ],
)
def test_blocks_of_mxfp4_that_do_not_fit_are_named(change: Change, problem: str, tmp_path: Path) -> None:
    tensors = {
        "m.down_proj_blocks": np.ones((2, 8, 2, 16), np.uint8),
        "m.down_proj_scales": np.full((2, 8, 2), 127, np.uint8),
    }
    change(tensors)
    refused(tmp_path / "in", {"quantization_config": MXFP4}, tensors, problem)


def test_nvfp4s_scale_of_scales_is_one_number(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.ones((2, 16), np.uint8), "a.weight_scale": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
        "a.weight_scale_2": np.ones(2, np.float32),
    }  # fmt: skip
    facts = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    refused(tmp_path / "in", facts, tensors, "'a.weight_scale_2': is not one number")


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [128.0, 128], [1 << 40, 1]])
def test_impossible_blocks(size: Any, tmp_path: Path) -> None:
    facts = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    tensors = {"a.weight": CODES, "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    refused(tmp_path / "in", facts, tensors, "weight_block_size is not possible")


@pytest.mark.parametrize(
    ("pattern", "spared"),
    [
        ("b", True), ("model.b", True), ("model.*", True), ("re:.*b", True), ("*.b", True), ("model", True),
        ("c", False), ("odel.b", False), ("re:model\\.c", False), ("model.b.c", False), ("b*c", False),
    ],
)  # fmt: skip
def test_modules_that_are_not_quantized(pattern: str, spared: bool, tmp_path: Path) -> None:
    """An 8-bit float without scales is a number only where its module is listed."""
    facts = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
    folder = write_folder(tmp_path / "in", {"quantization_config": facts}, {"model.b.weight": CODES})
    if not spared:
        refused(folder, {"quantization_config": facts}, {"model.b.weight": CODES}, "without scales.*modules_to_not")
        return
    anyckpt.convert(folder, tmp_path / "out.safetensors", to="safetensors", dtype="bf16")
    found = read_safetensors(LocalFile(tmp_path / "out.safetensors"))[0]["model.b.weight"].numpy()
    np.testing.assert_array_equal(found.astype(np.float32), CODES.astype(np.float32))


def test_eight_bit_floats_that_no_scales_belong_to(tmp_path: Path) -> None:
    """What the note says of them is what makes them numbers."""
    source, name = fixture_path("families/llama/hf"), "model.layers.0.mlp.down_proj.weight"
    tensors = {key: tensor.numpy() for key, tensor in anyckpt.open(source).weights().items()}
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    config = json.loads((source / "config.json").read_text())
    folder = write_folder(tmp_path / "in", config, tensors)
    done = anyckpt.convert(folder, tmp_path / "x.safetensors", to="safetensors", dtype="bf16")
    (note,) = (note for note in done.notes if "are not cast" in note)
    (tmp_path / "config.json").write_text(json.dumps({**config, **json.loads(f"{{{note.rpartition('in it ')[2]}}}")}))
    anyckpt.convert(folder, tmp_path / "o", to="megatron-core", dtype="bf16", config=tmp_path / "config.json")
    anyckpt.convert(tmp_path / "o", tmp_path / "h", to="hf")
    found = anyckpt.open(tmp_path / "h").weights()[name].numpy()
    np.testing.assert_array_equal(found.astype(np.float32), tensors[name].astype(np.float32))


def test_a_configuration_that_is_given_tells_too(tmp_path: Path) -> None:
    folder = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "fp8", FP8, as_fp8())
    config = tmp_path / "elsewhere.json"
    (folder / "config.json").rename(config)
    anyckpt.convert(folder, tmp_path / "out", to="hf", dtype="bf16", config=config)
    assert arrays(tmp_path / "out").keys() == arrays(fixture_path("families/deepseek_v3/hf")).keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_methods_have_names() -> None:
    known = {
        "fp8", "mxfp4", "modelopt", "compressed-tensors", "fbgemm_fp8", "trtllm", "gptq", "awq", "bitsandbytes", "mlx"
    }  # fmt: skip
    assert known == METHODS.keys()


@pytest.mark.parametrize("name", ["deepseek_v3", "nvfp4"])
def test_inspect_and_verify_see_the_model(name: str, tmp_path: Path) -> None:
    """Its family and true number of parameters, and that no tensor is missing; nothing is read for it."""
    plain = fixture_path("families/deepseek_v3/hf" if name == "deepseek_v3" else SOURCE)
    folder = fixture_path("quant/nvfp4_b/hf")
    if name == "deepseek_v3":
        folder = quantized(plain, tmp_path / "fp8", FP8, as_fp8())
    found, expected = anyckpt.inspect(folder), anyckpt.inspect(plain)
    assert (found.family, found.parameters, found.model) == (expected.family, expected.parameters, expected.model)
    names = [tensor.name for tensor in anyckpt.inspect(folder, names="hub", tensors="*").tensors or ()]
    assert names == [tensor.name for tensor in anyckpt.inspect(plain, names="hub", tensors="*").tensors or ()]
    result = anyckpt.verify(folder)
    assert result.checked.model
    assert not result.problems
    assert anyckpt.inspect(folder).dtypes.keys() & {"float8_e4m3fn"}, "as stored"


def test_verify_finds_a_scale_that_is_missing(tmp_path: Path) -> None:
    folder = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "fp8", FP8, as_fp8())
    tensors = arrays(folder)
    gone = next(key for key in tensors if key.endswith("_scale_inv"))
    write_folder(
        folder, json.loads((folder / "config.json").read_text()), {k: t for k, t in tensors.items() if k != gone}
    )
    result = anyckpt.verify(folder)
    assert any("without scales" in problem.problem for problem in result.problems)
    assert anyckpt.inspect(folder).family is None


@pytest.mark.parametrize(
    ("algorithm", "ending", "bad", "problem"),
    [
        ("mxfp4", ".weight_scale", np.uint8(255), "are infinite or no numbers"),
        ("nvfp4", ".weight_global_scale", np.float32(0), "are zero"),
    ],
)
def test_verify_finds_a_number_that_no_scale_has(
    algorithm: str, ending: str, bad: Any, problem: str, tmp_path: Path
) -> None:
    """An exponent that is not-a-number, and a number that all scales are divided by."""
    anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", quantize=algorithm)
    tensors = arrays(tmp_path / "q")
    assert anyckpt.verify(tmp_path / "q").checked.scales
    name = next(key for key in tensors if key.endswith(ending))
    changed = tensors[name].copy()
    changed.reshape(-1)[0] = bad
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    found = anyckpt.verify(write_folder(tmp_path / "bad", config, {**tensors, name: changed}))
    assert [each.where for each in found.problems] == [name]
    assert problem in found.problems[0].problem


def test_a_method_that_is_not_understood_is_no_damage(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq"}, "model_type": "llama"}
    folder = write_folder(tmp_path / "awq", config, {"a.qweight": np.ones((4, 4), np.int32)})
    result = anyckpt.verify(folder)
    assert not result.problems
    assert any("quantized by awq" in text for text in result.warnings)
    assert any("not understood" in text for text in anyckpt.inspect(folder).warnings)


def test_diff_compares_numbers_where_one_side_is_quantized(tmp_path: Path) -> None:
    folder = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "fp8", FP8, as_fp8())
    anyckpt.convert(folder, tmp_path / "out", to="megatron-core", dtype="bf16")
    for pair in ((folder, tmp_path / "out"), (tmp_path / "out", folder), (folder, folder)):
        assert anyckpt.diff(*pair).equal
    plain = anyckpt.diff(folder, fixture_path("families/deepseek_v3/hf"))
    assert plain.different
    assert not plain.only_in_a
    assert not plain.only_in_b


def test_what_is_said_of_weights_that_cannot_be_seen_as_numbers(tmp_path: Path) -> None:
    """The cause: inspect and diff have no --dtype that would help."""
    source = fixture_path("families/deepseek_v3/hf")
    folder, other = (quantized(source, tmp_path / name, FP8, as_fp8()) for name in ("fp8", "other"))
    tensors = arrays(folder)
    gone = next(key for key in tensors if key.endswith("_scale_inv"))
    kept = {key: tensor for key, tensor in tensors.items() if key != gone}
    damaged = write_folder(tmp_path / "damaged", json.loads((folder / "config.json").read_text()), kept)
    (warning,) = anyckpt.inspect(damaged).warnings
    assert "is a quantized weight without scales" in warning and "--dtype" not in warning
    (note,) = anyckpt.diff(damaged, source).notes
    assert "is a quantized weight without scales" in note and "--dtype" not in note
    assert anyckpt.diff(folder, other).notes == ("compared under stored names, because both are quantized",)


def test_work_to_resume_is_told_by_its_numbers(tmp_path: Path) -> None:
    """The same plan has the same fingerprint each time; another type, another scheme or other blocks have not."""
    stored = {"a.weight": CODES, "a.weight_scale_inv": np.ones((2, 2), np.float32)}
    folder = write_folder(tmp_path / "in", {}, stored)

    def printed(to: str, block: list[int] | None = None) -> str:
        tensors = read_safetensors(LocalFile(folder / "model.safetensors"))[0]
        facts = {"quant_method": "fp8", "weight_block_size": block or [2, 2]}
        weight = dequantize(tensors, facts, to, "x").tensors["a.weight"]
        plan = Plan("x", (OutputFile("x", (TensorData("a", weight),)),))
        return fingerprint(plan, [str(folder)])

    assert printed("bfloat16") == printed("bfloat16")
    assert len({printed("bfloat16"), printed("float16"), printed("bfloat16", [2, 3])}) == 3


def test_a_mean_of_quantized_models(tmp_path: Path) -> None:
    """Codes are not averaged; numbers are."""
    one = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "one", FP8, as_fp8())

    def twice(name: str, weight: np.ndarray[Any, Any]) -> Arrays:
        return as_fp8()(name, 2 * weight + 0.01)

    two = quantized(fixture_path("families/deepseek_v3/hf"), tmp_path / "two", FP8, twice)
    with pytest.raises(MappingError, match="float8_e4m3fn, which is not averaged, and differs"):
        anyckpt.average([one, two], tmp_path / "mean")
    anyckpt.average([one, two], tmp_path / "mean", dtype="fp32")
    for folder in (one, two):
        anyckpt.convert(folder, folder.with_suffix(".full"), to="hf", dtype="fp32")
    mean, first, second = (arrays(path) for path in (tmp_path / "mean", tmp_path / "one.full", tmp_path / "two.full"))
    assert mean.keys() == first.keys()
    for name, array in mean.items():
        expected = (first[name].astype(np.float64) + second[name]) / 2
        if array.dtype == np.float32 and f"{name}_scale_inv" in arrays(one):
            np.testing.assert_array_equal(array, expected.astype(np.float32))
