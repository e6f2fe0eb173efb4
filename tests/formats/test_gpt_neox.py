"""Checkpoints of GPT-NeoX: layer files of DeepSpeed's own save loop, against what NeoX's own converter made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, UsageError
from anyckpt.storage.location import look_at

TP2 = fixture_path("gpt_neox/tp2")
CONVERTED = fixture_path("gpt_neox/converted.safetensors")
SAVE = "global_step10"


def expected() -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(CONVERTED).items()}


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = anyckpt.open(path).weights()
    return {name: tensor.numpy() for name, tensor in found.items() if "inv_freq" not in name}


def written(path: Path, root: Any) -> None:
    write_plan(Plan("x", (OutputFile(path.name, zip_parts(root)),)), path.parent)


def root_of(path: Path) -> dict[str, Any]:
    return dict(read_torch(look_at(path).open()).root)


def check_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array), name


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TP2, tmp_path / "run"))


def sequential(folder: Path, config: str) -> Path:
    """The same as it is saved without a pipeline: all layers in the ranks' files."""
    for rank in range(2):
        file = folder / SAVE / f"mp_rank_{rank:02d}_model_states.pt"
        module = {}
        for layer in sorted((folder / SAVE).glob(f"layer_*-model_{rank:02d}-*")):
            number = int(layer.name[6:8])
            module |= {f"sequential.{number}.{name}": tensor for name, tensor in root_of(layer).items()}
        written(file, {**root_of(file), "module": module})
    for layer in (folder / SAVE).glob("layer_*"):
        layer.unlink()
    (folder / SAVE / "configs" / "model.yml").write_text(config)
    return folder


def test_ranks_are_joined_as_by_neoxs_converter(tmp_path: Path) -> None:
    for path in (TP2, TP2 / SAVE):
        check_equal(weights(path), expected())
    opened = anyckpt.open(TP2)
    assert (opened.format, opened.layout.tensor_parallel, opened.training.step) == ("gpt-neox", 2, 10)
    anyckpt.convert(TP2, tmp_path / "hf", to="hf")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copy(CONVERTED, theirs / "model.safetensors")
    shutil.copy(CONVERTED.parent / "converted.json", theirs / "config.json")
    assert anyckpt.diff(tmp_path / "hf", theirs).equal
    anyckpt.convert(TP2, tmp_path / "core", to="megatron-core")
    assert anyckpt.diff(tmp_path / "core", theirs, weights_only=True).equal
    assert not anyckpt.verify(TP2).problems


def test_without_a_pipeline(copied: Path) -> None:
    config = (copied / SAVE / "configs" / "model.yml").read_text()
    opened = anyckpt.open(sequential(copied, config.replace('"pipe-parallel-size": 1', '"pipe-parallel-size": 0')))
    assert (opened.format, opened.layout.tensor_parallel) == ("gpt-neox", 2)
    check_equal(weights(copied), expected())


def test_newer_names_of_the_mlp(copied: Path) -> None:
    for layer in (copied / SAVE).glob("layer_0[2-5]*"):
        renamed = {
            name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2"): tensor
            for name, tensor in root_of(layer).items()
        }
        written(layer, renamed)
    check_equal(weights(copied), expected())


def test_biases_of_layers_one_after_the_other_are_not_summed(copied: Path) -> None:
    """There each rank adds the whole bias to what all ranks have: NeoX's converter adds them up all the same."""
    settings = copied / SAVE / "configs" / "model.yml"
    settings.write_text(settings.read_text().replace('"gpt-j-residual": true', '"gpt-j-residual": false'))
    found, wanted = weights(copied), expected()
    bias = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    own = root_of(copied / SAVE / "layer_03-model_00-model_states.pt")["mlp.dense_4h_to_h.bias"].numpy()
    assert np.array_equal(found[bias], own)
    assert not np.array_equal(found[bias], wanted[bias])
    assert anyckpt.open(copied).config["use_parallel_residual"] is False


def test_norms_that_drifted_apart_are_averaged(copied: Path) -> None:
    layer = copied / SAVE / "layer_02-model_01-model_states.pt"
    root = root_of(layer)
    own = root["input_layernorm.weight"].numpy()
    from anyckpt.tensor import from_array

    written(layer, {**root, "input_layernorm.weight": from_array(own + np.float32(2))})
    assert np.array_equal(weights(copied)["gpt_neox.layers.0.input_layernorm.weight"], own + 1)


def test_a_tied_model(copied: Path) -> None:
    for rank in range(2):
        first = root_of(copied / SAVE / f"layer_00-model_{rank:02d}-model_states.pt")
        written(copied / SAVE / f"layer_08-model_{rank:02d}-model_states.pt", first)
    settings = copied / SAVE / "configs" / "model.yml"
    settings.write_text(settings.read_text().replace('"no-weight-tying": true', '"no-weight-tying": false'))
    opened = anyckpt.open(copied)
    assert opened.config["tie_word_embeddings"] is True and "embed_out.weight" not in opened.tensors
    assert opened.ignored["8.word_embeddings.weight"].startswith("the embedding once more")
    assert anyckpt.inspect(copied).family == "gpt_neox"


def test_another_model_keeps_its_numbers(copied: Path, tmp_path: Path) -> None:
    settings = copied / SAVE / "configs" / "model.yml"
    settings.write_text(settings.read_text().replace('"rotary"', '"alibi"'))
    opened = anyckpt.open(copied)
    assert "2.attention.query_key_value.weight" in opened.tensors and not opened.config
    assert any("pos_emb alibi" in text for text in opened.warnings)
    anyckpt.convert(copied, tmp_path / "out.safetensors")
    with pytest.raises(UsageError):
        anyckpt.convert(copied, tmp_path / "out", to="nemo2")


def test_without_settings(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / SAVE / "configs")
    with pytest.raises(FormatError, match="said by gpt-j-residual.*copy the run's configuration"):
        anyckpt.open(copied)
    for file in (copied / SAVE).glob("*_01[-_]*"):
        file.unlink()
    (copied / SAVE / "mp_rank_01_model_states.pt").unlink(missing_ok=True)
    opened = anyckpt.open(copied)
    assert not opened.config and any("--config" in text for text in opened.warnings)
    (copied / "20B.yml").write_text(json.dumps({"num-layers": 4, "pos-emb": "rotary", "hidden-size": 16}))
    with pytest.raises(FormatError, match="settings lack num_attention_heads"):
        anyckpt.open(copied)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("layer_03-model_01-model_states.pt", None, "ranks are missing: layer_03-model_01-model_states.pt"),
        ("layer_03-model_01-model_states.pt", [], "does not hold a dictionary"),
        ("layer_03-model_01-model_states.pt", {}, "not the same in all tensor-parallel ranks"),
        ("layer_03-model_01-model_states.pt", "layer_02-model_01-model_states.pt", ""),
        ("layer_07-model_01-model_states.pt", "layer_08-model_01-model_states.pt", "not the same in all"),
    ],
)
def test_damage_is_told(file: str, change: Any, message: str, copied: Path) -> None:
    path = copied / SAVE / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        shutil.copy(copied / SAVE / change, path)
    else:
        written(path, change)
    if message:
        with pytest.raises(FormatError, match=message):
            anyckpt.open(copied)
    else:
        anyckpt.open(copied)


@pytest.mark.parametrize(
    ("name", "message"), [("input_layernorm.weight", "do not fit one another"), ("adapter.down.weight", "is not known")]
)
def test_parts_that_do_not_fit_and_names_that_are_not_known(name: str, message: str, copied: Path) -> None:
    for rank in range(2):
        layer = copied / SAVE / f"layer_02-model_{rank:02d}-model_states.pt"
        root = root_of(layer)
        other = root["attention.dense.weight"] if rank or "adapter" in name else root[name]
        written(layer, {**root, name: other})
    with pytest.raises(FormatError, match=message):
        anyckpt.open(copied)


def test_other_pipelines_of_deepspeed_are_refused_as_before(copied: Path) -> None:
    for layer in (copied / SAVE).glob("layer_*"):
        written(layer, {f"self_{name}": tensor for name, tensor in root_of(layer).items()})
    with pytest.raises(FormatError, match="pipeline stages"):
        anyckpt.open(copied)
