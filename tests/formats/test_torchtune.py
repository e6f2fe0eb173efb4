"""Folders of torchtune: parts of a Hugging Face state dict that neither an index nor their names count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.support import file_bytes

from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.formats import registry
from anyckpt.tensor import from_array

WHOLE = {f"model.layers.{n}.weight": np.full((2, 3), n, np.float32) for n in range(5)}


@pytest.fixture
def anyckpt(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def model(to: Path, epoch: int = 0) -> Path:
    folder = to / "tuned"
    folder.mkdir(exist_ok=True)
    for part, names in enumerate(([0, 1], [2, 3], [4]), 1):
        state = {f"model.layers.{n}.weight": from_array(WHOLE[f"model.layers.{n}.weight"]) for n in names}
        path = folder / f"hf_model_{part:04d}_{epoch}.pt"
        path.write_bytes(file_bytes(OutputFile("", zip_parts(state))))
    (folder / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    return folder


def test_parts_are_joined(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    (folder / "recipe_state.pt").write_bytes(b"")
    opened = registry.read(folder)
    assert opened.format == "hf"
    assert {name: tensor.numpy().tolist() for name, tensor in opened.tensors.items()} == {
        name: array.tolist() for name, array in WHOLE.items()
    }
    assert any("recipe_state.pt" in text for text in opened.warnings)
    assert anyckpt("verify", folder).code == 0
    assert anyckpt("convert", folder, tmp_path / "out", "--to", "hf").code == 0
    assert anyckpt("diff", folder, tmp_path / "out").code == 0


def test_a_missing_part(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    (folder / "hf_model_0002_0.pt").unlink()
    assert "1 of at least 3 weight files are missing, such as hf_model_0002_0.pt" in anyckpt("verify", folder).damage


def test_several_epochs(tmp_path: Path, anyckpt: Runner) -> None:
    model(tmp_path, 1)
    assert "weights of several epochs" in anyckpt("convert", model(tmp_path), tmp_path / "o", "--to", "hf").error


def test_one_tensor_in_two_parts(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    (folder / "hf_model_0002_0.pt").write_bytes((folder / "hf_model_0001_0.pt").read_bytes())
    assert "tensor 'model.layers.0.weight': is in two weight files" in anyckpt("verify", folder).damage
