"""Checkpoints that DeepSpeed's engine saved.

DeepSpeed 0.19.8 with torch 2.13.0, two ranks on CPUs with Gloo, bf16, ``torch.optim.AdamW`` with two groups, two steps.
The digests in ``expected.json`` are of what ``zero_to_fp32`` gives, whose weights are the engine's float32 ones, and of
the Adam moments in the memory of the engine (stages 1 and 2: its own map of fragments; stage 3:
``safe_get_full_optimizer_state``).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import anyckpt
from anyckpt.tensor import LazyTensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "deepspeed"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def digest(tensor: LazyTensor) -> str:
    out = np.empty(tensor.size, dtype=tensor.dtype.raw)
    tensor.read_flat(0, out)
    return hashlib.sha256(out.tobytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_engines_weights_and_moments_are_read(name: str) -> None:
    checkpoint = anyckpt.open(FIXTURES / name)
    assert checkpoint.format == "deepspeed"
    found = {tensor: [list(own.shape), digest(own)] for tensor, own in checkpoint.tensors.items()}
    assert {own.dtype.name for own in checkpoint.tensors.values()} == {"float32"}
    assert found == EXPECTED[name]
