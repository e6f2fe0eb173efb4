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

from tests.quantization.test_forms import UNREAD  # noqa: E402

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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of experts that have several blocks of 128 by 128 each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("mixture")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("algorithm", FORMS["compressed-tensors"])
def test_experts_that_transformers_does_not_read(algorithm: str, mixture: Path, tmp_path: Path) -> None:
    """The others are bit for bit those that we read."""
    options: dict[str, Any] = {"quantize_form": "compressed-tensors", "group_size": 32 if algorithm == "int4" else None}
    anyckpt.convert(mixture, tmp_path / "q", to="hf", quantize=algorithm, **options)
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="bf16")
    load, whole = (
        transformers.AutoModelForCausalLM.from_pretrained,
        transformers.CompressedTensorsConfig(dequantize=True),
    )
    expected = load(tmp_path / "back", dtype=torch.bfloat16).state_dict()
    try:
        loaded = load(tmp_path / "q", dtype=torch.bfloat16, quantization_config=whole).state_dict()
        read = all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    except RuntimeError:
        read = False
    assert read == (algorithm not in UNREAD)
