"""Dequantized TensorRT-LLM checkpoints in transformers: near the logits of the model that was quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "fp8_a/trtllm_tp1pp1": ("src_llama_a", 0.1),
    "int8_sq_a/trtllm_tp1pp1": ("src_llama_a", 0.05),
    "int4_awq_a/trtllm_tp2pp2": ("src_llama_a", 0.3),
    "nvfp4_b/trtllm_tp1pp1": ("src_llama_b", 0.25),
    "fp8_moe_c/trtllm_tp1pp1": ("src_mixtral_c", 0.15),
}
"""Checkpoint -> what it was quantized from, and the largest error of logits, relative to their root mean square."""


def logits(folder: Path):  # type: ignore[no-untyped-def]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_stay_near(tmp_path: Path, case: str) -> None:
    source, bound = CASES[case]
    original = fixture_path(f"quant/{source}/hf")
    anyckpt.convert(fixture_path(f"quant/{case}"), tmp_path / "hf", to="hf", dtype="fp32", config=original)
    expected, found = logits(original), logits(tmp_path / "hf")
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < bound
