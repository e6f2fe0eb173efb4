"""transformers loads models with fewer layers, merged ones and grown ones, and computes with them as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt

pytestmark = pytest.mark.peer

TOKENS = [[1, 2, 3, 4, 5, 6, 7]]


def loaded(path: Path) -> Any:
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def logits(model: Any, tokens: list[list[int]] = TOKENS) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), use_cache=False).logits


def without(model: Any, kept: list[int]) -> Any:
    """The model with layers taken out in memory."""
    from torch import nn

    model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in kept]
    return model


@pytest.mark.parametrize(("family", "kept"), [("llama", [1]), ("gemma3", [0, 1, 3, 5]), ("deepseek_v3", [1])])
def test_fewer_layers(family: str, kept: list[int], tmp_path: Path) -> None:
    import torch

    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "out", to="hf", keep_layers=kept)
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(without(loaded(source), kept)))


def test_a_merged_model(tmp_path: Path) -> None:
    """Task arithmetic is linear: what torch computes of the parameters is what is written."""
    import torch

    a, b, base = (fixture_path(f"mergekit/{name}") for name in ("a", "b", "base"))
    anyckpt.merge([a, b], tmp_path / "out", base=base, method="task_arithmetic", weights=[0.5, -0.25])
    found, first, second, under = (loaded(path) for path in (tmp_path / "out", a, b, base))
    for own, x, y, z in zip(*(m.parameters() for m in (found, first, second, under)), strict=True):
        assert torch.allclose(own, z + 0.5 * (x - z) - 0.25 * (y - z), atol=1e-6)
    assert torch.isfinite(logits(found)).all()


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    """Old tokens have the logits that they had; new ones get the mean of these."""
    import torch

    source = fixture_path("families/llama/hf")
    layout = anyckpt.LayoutRequest(vocab_size=160, new_rows="mean")
    anyckpt.convert(source, tmp_path / "out", to="hf", layout=layout)
    found, before = logits(loaded(tmp_path / "out")), logits(loaded(source))
    assert found.shape[-1] == 160 and torch.allclose(found[..., :151], before, atol=1e-6)
    assert torch.allclose(found[..., 151:], before.mean(-1, keepdim=True).expand(-1, -1, 9), atol=1e-5)
