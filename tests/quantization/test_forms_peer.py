"""Folders of quantized weights in the libraries that load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.peer

import anyckpt  # noqa: E402
from anyckpt.quantization.forms import FORMS  # noqa: E402

SOURCE = "quant/src_llama_a/hf"


@pytest.mark.parametrize("algorithm", FORMS["compressed-tensors"])
def test_transformers_loads_compressed_tensors(algorithm: str, tmp_path: Path) -> None:
    """Its weights, which the library decompresses, are bit for bit those that we read."""
    group = 32 if algorithm == "int4" else None
    options: dict[str, Any] = {"quantize_form": "compressed-tensors", "group_size": group}
    anyckpt.convert(fixture_path(SOURCE), tmp_path / "q", to="hf", quantize=algorithm, **options)
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="bf16")
    back = anyckpt.open(tmp_path / "back").weights()
    whole = transformers.CompressedTensorsConfig(run_compressed=False)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "q", dtype=torch.bfloat16, quantization_config=whole)
    loaded = model.state_dict()
    for name, tensor in back.items():
        assert torch.equal(loaded[name].to(torch.bfloat16), tensor.torch()), name
    original = load(fixture_path(SOURCE), dtype=torch.bfloat16)
    if algorithm == "fp8_blocks":  # whose activations are in groups of 128, which 192 columns are not
        return
    with torch.no_grad():
        found, expected = (one(torch.arange(24)[None]).logits.float().flatten() for one in (model, original))
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > (0.8 if "4" in algorithm else 0.99)
