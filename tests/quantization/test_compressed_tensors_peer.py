"""What compressed-tensors compresses is dequantized to what it decompresses, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
compressed_tensors = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.peer

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import anyckpt  # noqa: E402

CHANNEL = {"strategy": "channel"}
GROUP = {"strategy": "group", "group_size": 32}
CASES = {
    "float-quantized": [
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", **CHANNEL},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ],
    "int-quantized": [{"num_bits": 8, "type": "int", **CHANNEL}, {"num_bits": 8, "type": "int", **GROUP}],
    "pack-quantized": [
        {"num_bits": 4, "type": "int", **GROUP},
        {"num_bits": 4, "type": "int", **CHANNEL},
        {"num_bits": 8, "type": "int", **CHANNEL},
    ],
}


def compressed(weight: Any, name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """Class and state of one weight as the library stores it, and its scheme."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **settings))
    rows, columns = weight.shape
    shape = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // 32),
        "block": (-(-rows // 32), -(-columns // 16)),
    }[settings["strategy"]]
    largest = 448.0 if settings["type"] == "float" else 2.0 ** (settings["num_bits"] - 1) - 1
    scale = (torch.rand(shape) * 0.5 + 0.75).to(weight.dtype) * (weight.abs().max() / largest)
    kind = BaseCompressor.get_value_from_registry(name)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    return kind, kind.compress(state, scheme), scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "settings"), [(name, each) for name, several in CASES.items() for each in several])
def test_equal_to_what_the_library_decompresses(
    name: str, settings: dict[str, Any], dtype: Any, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    columns = 96 if settings["strategy"] == "group" else 100
    kind, state, scheme = compressed(torch.randn(64, columns, dtype=dtype), name, settings)
    facts = {
        "quant_method": "compressed-tensors",
        "format": name,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}},
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": facts}))
    stored = {f"a.{key}": value.contiguous() for key, value in state.items()}
    save_file(stored, tmp_path / "in" / "model.safetensors")
    to = str(dtype).removeprefix("torch.")
    anyckpt.convert(tmp_path / "in", tmp_path / "out.safetensors", to="safetensors", dtype=to)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"a.weight"}
    assert torch.equal(found["a.weight"], kind.decompress(state, scheme)["weight"])
    assert found["a.weight"].dtype == dtype


def decompressed(
    name: str, settings: dict[str, Any], state: dict[str, Any], folder: Path, to: str, **more: Any
) -> tuple[Any, Any]:
    """What we and what the library make of a weight's parts."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    stated = {**json.loads(scheme.weights.model_dump_json()), **more}
    facts = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"g": {"weights": stated}}}
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": facts}))
    stored = {f"a.{key}": value.contiguous() for key, value in state.items()}
    save_file(stored, folder / "in" / "model.safetensors")
    anyckpt.convert(folder / "in", folder / "out.safetensors", to="safetensors", dtype=to)
    kind = BaseCompressor.get_value_from_registry(name)
    return load_file(folder / "out.safetensors")["a.weight"], kind.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", [CHANNEL, GROUP])
def test_zero_points(bits: int, layout: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = {"num_bits": bits, "type": "int", "symmetric": False, **layout}
    groups = 3 if "group_size" in layout else 1
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    zeros = torch.randint(-(1 << bits - 1), 1 << bits - 1, (64, groups), dtype=torch.int8)
    state = {
        "weight": torch.randn(64, 96, dtype=torch.bfloat16),
        "weight_scale": (torch.rand(64, groups) * 0.1).bfloat16(),
        "weight_zero_point": zeros,
    }
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    found, expected = decompressed("pack-quantized", settings, packed, tmp_path, "bfloat16")
    assert torch.equal(found, expected)


def test_columns_in_another_order(tmp_path: Path) -> None:
    """As releases before 0.20 store ``weight_g_idx``, which this one does not read."""
    settings = {"num_bits": 4, "type": "int", "symmetric": True, **GROUP}
    torch.manual_seed(4)
    weight, order = torch.randn(64, 96, dtype=torch.bfloat16), torch.randperm(96)
    _, state, _ = compressed(weight, "pack-quantized", {k: v for k, v in settings.items() if k != "symmetric"})
    groups = (torch.arange(96) // 32)[order].to(torch.int32)
    ordered = {**state, "weight_g_idx": groups}
    ones = {**state, "weight_scale": torch.ones(64, 3)}
    codes, _ = decompressed("pack-quantized", settings, ones, tmp_path / "codes", "float32")
    found, _ = decompressed("pack-quantized", settings, ordered, tmp_path / "all", "bfloat16", actorder="group")
    assert torch.equal(found, (codes * state["weight_scale"].float()[:, groups.long()]).bfloat16())


def test_four_bit_floats(tmp_path: Path) -> None:
    torch.manual_seed(5)
    settings = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    state = {
        "weight": weight,
        "weight_scale": (torch.rand(64, 6) * 400 + 40).to(torch.float8_e4m3fn).bfloat16(),
        "weight_global_scale": torch.tensor([700.0]),
    }
    packed = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").compress(state, scheme)
    found, expected = decompressed("nvfp4-pack-quantized", settings, packed, tmp_path, "bfloat16")
    assert torch.equal(found, expected)


def test_awq_as_the_library_converts_it() -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    from anyckpt.quantization import dequantize
    from anyckpt.tensor import from_array

    torch.manual_seed(6)
    limit = 1 << 31
    parts = {
        "a.qweight": torch.randint(-limit, limit, (64, 4), dtype=torch.int64).to(torch.int32),
        "a.qzeros": torch.randint(-limit, limit, (2, 4), dtype=torch.int64).to(torch.int32),
        "a.scales": (torch.rand(2, 32) * 0.1).half(),
    }
    ours = {name: from_array(tensor.numpy()) for name, tensor in parts.items()}
    found = dequantize(ours, {"quant_method": "awq", "bits": 4, "group_size": 32}, "float16", "x").tensors["a.weight"]
    converted = AutoAWQConverter(group_size=32).process(dict(parts))
    settings = {"num_bits": 4, "type": "int", "symmetric": False, **GROUP}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    kind = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix("a."): tensor for name, tensor in converted.items()}
    assert torch.equal(found.torch(), kind.decompress(state, scheme)["weight"])
