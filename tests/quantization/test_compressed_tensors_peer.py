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
from anyckpt.errors import MappingError  # noqa: E402

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


def test_zero_points_are_refused(tmp_path: Path) -> None:
    settings = {"num_bits": 4, "type": "int", "symmetric": False, **CHANNEL}
    facts = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": settings}},
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"quantization_config": facts, "model_type": "x"}))
    save_file({"a.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(MappingError, match="not understood.*found compressed-tensors pack-quantized"):
        anyckpt.convert(tmp_path / "in", tmp_path / "out.safetensors", to="safetensors", dtype="bf16")
