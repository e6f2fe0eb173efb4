"""Configurations that are handed in as folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import FormatError
from anyckpt.formats.registry import read
from anyckpt.operations.steps.user_files import read_config

LLAMA = fixture_path("families/llama/hf")


def test_a_folder_with_a_configuration_alone(tmp_path: Path) -> None:
    """As trainers keep it beside their own files: ``actor/huggingface``."""
    shutil.copy(LLAMA / "config.json", tmp_path)
    shutil.copy(LLAMA / "tokenizer.json", tmp_path)
    assert read_config(tmp_path) == read(LLAMA).config
    anyckpt.convert(LLAMA, tmp_path / "x.safetensors", to="safetensors")
    anyckpt.convert(tmp_path / "x.safetensors", tmp_path / "out", to="hf", config=tmp_path)
    assert read(tmp_path / "out").config == read(LLAMA).config


def test_a_model_with_missing_weights_still_has_its_configuration(tmp_path: Path) -> None:
    shutil.copy(LLAMA / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert read_config(tmp_path) == read(LLAMA).config


@pytest.mark.parametrize("name", ["model_config.yaml", "hparams.yaml", "context/model.yaml"])
def test_other_frameworks_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("num_layers: 2\n")
    assert read_config(tmp_path) == {"num_layers": 2}


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a checkpoint of any known format"):
        read_config(tmp_path)
    anyckpt.convert(LLAMA, tmp_path / "model.safetensors", to="safetensors")
    with pytest.raises(FormatError, match="has no configuration"):
        read_config(tmp_path)
