"""transformers' Whisper computes what OpenAI's own code computed from its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt

pytestmark = pytest.mark.peer


def test_outputs_are_those_of_openais_code(tmp_path: Path) -> None:
    import torch
    from transformers import AutoFeatureExtractor, WhisperForConditionalGeneration

    anyckpt.convert(fixture_path("whisper/tiny.pt"), tmp_path / "hf", to="hf")
    model, told = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    with np.load(fixture_path("whisper/expected.npz")) as expected, torch.no_grad():
        found = model.eval()(
            input_features=torch.from_numpy(expected["mel"]), decoder_input_ids=torch.from_numpy(expected["tokens"])
        ).logits
        np.testing.assert_allclose(found.numpy(), expected["logits"], atol=1e-4)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    assert type(extractor).__name__ == "WhisperFeatureExtractor" and extractor.feature_size == 8


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    import torch

    anyckpt.convert(fixture_path("whisper/tiny.pt"), tmp_path / "hf", to="hf")
    anyckpt.convert(tmp_path / "hf", tmp_path / "back.pt", to="whisper")
    ours = torch.load(tmp_path / "back.pt", weights_only=True)
    theirs = torch.load(fixture_path("whisper/tiny.pt"), weights_only=True)
    assert ours["dims"] == theirs["dims"]
    assert ours["model_state_dict"].keys() == theirs["model_state_dict"].keys()
    for name, tensor in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], tensor), name
