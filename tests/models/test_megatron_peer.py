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

LIMITS = {"llama": 1e-6, "llama_tied_bf16": 1e-5, "llama31_ropescale": 1e-6}


def test_logits() -> None:
    """Plain, tied and scaled rope; a sliding window needs Transformer Engine, which has no CPU version."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_forward", *LIMITS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name: limit for name, limit in LIMITS.items() if found[name] > limit} == {}, found
