"""Pipelines of diffusers: what its ``save_pretrained`` wrote, read and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.errors import AnyckptError, FormatError, UnsafeError, UsageError
from anyckpt.storage import LocalFile

PIPELINE = fixture_path("diffusers/stable_diffusion")
MODELS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PIPELINE, tmp_path / "in"))


def test_every_part_is_read() -> None:
    opened = anyckpt.open(PIPELINE)
    assert opened.format == "diffusers"
    assert opened.format_version == "diffusers 0.42.1"
    assert opened.details["pipeline"] == "StableDiffusionPipeline"
    stored = {
        f"{part}.{name}": tensor
        for part, stem in MODELS.items()
        for name, tensor in read_safetensors(LocalFile(PIPELINE / part / f"{stem}.safetensors"))[0].items()
    }
    assert opened.tensors.keys() == stored.keys()
    assert all(opened[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in stored.items())
    assert {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"} < opened.artifacts.keys()
    assert not opened.warnings


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    done = anyckpt.convert(PIPELINE, tmp_path / "out", to="diffusers")
    assert files_of(tmp_path / "out") == files_of(PIPELINE)
    assert not done.ignored
    assert not anyckpt.verify(tmp_path / "out").problems


def test_weights_in_several_files(tmp_path: Path) -> None:
    anyckpt.convert(PIPELINE, tmp_path / "out", to="diffusers", max_shard_size=20_000)
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"].keys() == {"total_size"}
    assert len(set(index["weight_map"].values())) > 1
    assert anyckpt.diff(PIPELINE, tmp_path / "out").equal
    opened = anyckpt.open(tmp_path / "out")
    assert not opened.warnings


def test_another_type_is_said_where_a_configuration_says_one(tmp_path: Path) -> None:
    done = anyckpt.convert(PIPELINE, tmp_path / "out", to="diffusers", dtype="bf16")
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert config == {**json.loads((PIPELINE / "text_encoder/config.json").read_text()), "dtype": "bfloat16"}
    assert (tmp_path / "out/unet/config.json").read_bytes() == (PIPELINE / "unet/config.json").read_bytes()
    assert done.ignored == {
        "text_encoder/config.json": "written anew with bfloat16, the type that its weights have now"
    }


def test_a_second_set_of_weights_is_told_and_not_read(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for part, stem in MODELS.items():
        shutil.copy(folder / part / f"{stem}.safetensors", folder / part / f"{stem}.fp16.safetensors")
    opened = anyckpt.open(folder)
    assert opened.tensors.keys() == anyckpt.open(PIPELINE).tensors.keys()
    assert "unet: weights of another variant are not read: diffusion_pytorch_model.fp16.safetensors" in opened.warnings
    for part, stem in MODELS.items():
        (folder / part / f"{stem}.safetensors").unlink()
    assert anyckpt.diff(PIPELINE, folder).equal


def test_a_part_alone_is_a_folder_of_its_own() -> None:
    opened = anyckpt.open(PIPELINE / "unet")
    assert opened.format == "hf"
    assert opened.config["_class_name"] == "UNet2DConditionModel"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(FormatError, match=r"vae: a part of the pipeline is missing .*AutoencoderKL"):
        anyckpt.open(folder)


def test_folders_that_the_index_does_not_name_are_told(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "more").mkdir()
    assert anyckpt.open(folder).warnings == ["folders that model_index.json does not name are not read: more"]


@pytest.mark.parametrize("name", ["../unet", "/etc", "a/b", ".."])
def test_parts_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "X"]}))
    with pytest.raises(UnsafeError, match="outside its own folder"):
        anyckpt.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"unet": 3}'])
def test_a_damaged_index_is_an_error_or_says_nothing(text: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "model_index.json").write_text(text)
    if text.startswith('{"'):
        assert not anyckpt.open(folder).tensors
    else:
        with pytest.raises(FormatError):
            anyckpt.open(folder)


def test_only_pipelines_are_written_as_such(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only written of one"):
        anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


def test_names_of_no_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnyckptError, match="of no part of the pipeline"):
        anyckpt.convert(PIPELINE, tmp_path / "out", to="diffusers", rename="re:^unet=other")
