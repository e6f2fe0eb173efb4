"""The mean of adapters is that of their updates, at whatever scale each has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.execute import execute
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.tensor import from_array

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(path: Path, rank: int, alpha: float, seed: int, **settings: Any) -> Path:
    numbers = np.random.default_rng(seed)
    tensors = {
        f"{MODULE}.lora_A.weight": from_array(numbers.standard_normal((rank, 6)).astype("<f4")),
        f"{MODULE}.lora_B.weight": from_array(numbers.standard_normal((5, rank)).astype("<f4")),
    }
    path.mkdir()
    plan = registry.by_name("safetensors").plan
    assert plan is not None
    execute(plan(Checkpoint("made", "torch", tensors), WriteOptions()), str(path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def update(path: Path) -> np.ndarray[Any, Any]:
    found = registry.read(path)
    down, up = (found.tensors[f"{MODULE}.lora_{letter}.weight"].numpy().astype("f8") for letter in "AB")
    rank, alpha = found.config["r"], found.config["lora_alpha"]
    assert down.shape[0] == rank
    return np.asarray(alpha / (rank**0.5 if found.config.get("use_rslora") else rank) * up @ down)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0], [2.0, -1.0]])
def test_the_mean_of_updates(weights: list[float] | None, tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", 2, 8, 1)
    second = adapter(tmp_path / "b", 3, 32, 2, use_rslora=True)
    done = anyckpt.average([first, second], tmp_path / "out", weights=weights)
    expected = np.average([update(first), update(second)], axis=0, weights=weights)
    assert np.allclose(update(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert any("the rank is 5, the sum" in note for note in done.notes)
    assert not done.ignored


def test_what_has_no_mean_is_refused(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", 2, 8, 1)
    with pytest.raises(UsageError, match="is a model, and others are adapters"):
        anyckpt.average([first, fixture_path("families/llama/hf")], tmp_path / "out")
    with pytest.raises(UsageError, match="of which no mean is made"):
        anyckpt.average([first, adapter(tmp_path / "d", 2, 8, 1, use_dora=True)], tmp_path / "out")
