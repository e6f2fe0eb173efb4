"""A real Megatron-Core model with our weights, built from our arguments, computes the fixture's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")
pytestmark = pytest.mark.peer

LIMITS = {
    "llama": 1e-6, "llama_tied_bf16": 1e-5, "llama31_ropescale": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6, "phi3": 1e-6,
    "starcoder2": 1e-5, "starcoder_gpt_bigcode": 1e-5, "gpt2": 1e-5, "gpt_neox": 1e-6, "falcon_seq_mqa": 1e-6,
}  # fmt: skip


def test_logits() -> None:
    """What Megatron-Core computes without Transformer Engine: no window, and no norm that stores gamma - 1."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_forward", *LIMITS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name: limit for name, limit in LIMITS.items() if found[name] > limit} == {}, found
