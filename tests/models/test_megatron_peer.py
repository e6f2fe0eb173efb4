"""A real Megatron-Core model with our weights, built from our arguments, computes the fixture's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.peer_defects import broken_by

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


OTHER_GROUPS = broken_by(
    "transformers", "<5.23", AssertionError, "its Mamba-2 of several groups computes other outputs than Megatron-Core's"
)


@pytest.mark.parametrize("name", [pytest.param("mamba2", marks=OTHER_GROUPS), "mamba2-one-group"])
def test_mamba(name: str) -> None:
    """MambaModel computes transformers' logits, and saves what we write; any of its parameters rolled tells."""
    pytest.importorskip("transformers")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_mamba", name]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])[name]
    assert found["difference"] < 1e-4, found["difference"]
    assert found["least of rolled"] > 5e-3
    saved = {key.replace(".norm.weight", NORM) if ".mixer." not in key else key: s for key, s in found["saved"].items()}
    assert saved == found["written"]


NORM = ".mixer.in_proj.layer_norm_weight"
"""Where Transformer Engine's specification, which distributed checkpoints are of, has a layer's norm."""


@pytest.mark.parametrize("name", ["llama4", "llama4-interleaved", "llama4-lists"])
def test_llama_4(name: str) -> None:
    """Experts weighted on their input, layers without rotary embedding and norms without weights, as transformers."""
    pytest.importorskip("transformers")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_llama4", name]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])[name]
    assert found["difference"] < 1e-4, found["difference"]
    assert found["least of rolled"] > 0.05


def test_gated_delta_nets() -> None:
    """Megatron-Core's net computes what transformers' does, with our weights, and saves what we write."""
    pytest.importorskip("transformers")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_delta"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.strip().splitlines()[-1]).values():
        assert found["difference"] < 1e-3, found["difference"]
        assert found["rolled"] > 1
        assert found["saved"] == found["written"]
