"""Rank files of FSDP: joined to whole tensors, refused one by one.

The fixtures were written by torch 2.13 on 2 and 4 ranks over gloo: ``fully_shard`` with and without tensor parallelism,
``FullyShardedDataParallel`` with ``SHARDED_STATE_DICT``, a mesh of replicas; axes of 7, 3 and 5 are cut unevenly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.containers.torch_file import read_torch
from anyckpt.formats import registry
from anyckpt.storage.local_file import LocalFile

WHOLE = {"fsdp_2": "whole", "hsdp_4": "whole", "fsdp1_2": "whole_fsdp1", "fsdp_tp_4": "whole_tp"}


@pytest.fixture
def anyckpt(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def ranks(kind: str, to: Path) -> Path:
    return Path(shutil.copytree(fixture_path(f"fsdp/{kind}"), to / "actor"))


def rank_file(folder: Path, rank: int) -> Path:
    (found,) = folder.glob(f"model_world_size_*_rank_{rank}.pt")
    return found


@pytest.mark.parametrize(("kind", "whole"), WHOLE.items())
def test_ranks_are_joined_to_whole_tensors(kind: str, whole: str) -> None:
    joined = registry.read(fixture_path(f"fsdp/{kind}"))
    expected = read_torch(LocalFile(str(fixture_path(f"fsdp/{whole}.pt")))).root
    assert joined.format == "fsdp"
    assert joined.details["world_size"] == int(kind[-1])
    assert joined.part is None
    assert list(joined.weights()) == list(expected)
    for name, tensor in joined.weights().items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name


def test_configuration_and_tokenizer_lie_beside(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_2", tmp_path)
    (folder / "huggingface").mkdir()
    (folder / "huggingface/config.json").write_text('{"model_type": "nobodys"}')
    (folder / "huggingface/tokenizer.json").write_text("{}")
    (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    (folder / "extra_state_world_size_2_rank_0.pt").write_bytes(b"")
    opened = registry.read(folder)
    assert opened.config == {"model_type": "nobodys"}
    assert opened.tokenizer is not None
    assert opened.format_version == "version 2"
    assert any("random states are not read" in text for text in opened.warnings)
    assert anyckpt("verify", folder).code == 0


@pytest.mark.parametrize("kind", WHOLE)
def test_one_rank_is_no_model(kind: str, tmp_path: Path, anyckpt: Runner) -> None:
    part = tmp_path / "weights.pt"
    shutil.copy(rank_file(fixture_path(f"fsdp/{kind}"), 1), part)
    shown = anyckpt("inspect", part)
    assert shown.code == 0
    assert "is one rank's part" in shown.err
    for target in ("safetensors", "torch", "hf"):
        assert "is one rank's part" in anyckpt("convert", part, tmp_path / "out", "--to", target).error
    verified = anyckpt("verify", part)
    assert verified.code == 1
    assert "is one rank's part" in verified.out
    assert "is one rank's part" in anyckpt("diff", part, part).error
    assert not (tmp_path / "out").exists()


def test_one_rank_in_a_hugging_face_folder_is_no_model(tmp_path: Path, anyckpt: Runner) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    shutil.copy(rank_file(fixture_path("fsdp/fsdp_2"), 0), tmp_path / "model/pytorch_model.bin")
    assert (
        "is one rank's part (fsdp 0 of 2)" in anyckpt("convert", tmp_path / "model", tmp_path / "o", "--to", "hf").error
    )


def test_a_missing_rank(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("hsdp_4", tmp_path)
    rank_file(folder, 2).unlink()
    told = "1 of 4 rank files are missing, such as model_world_size_4_rank_2.pt"
    for words in (("inspect", folder), ("convert", folder, tmp_path / "o", "--to", "torch")):
        assert told in anyckpt(*words).error
    assert told in anyckpt("verify", folder).damage


def test_another_world_size(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_2", tmp_path)
    shutil.copy(rank_file(fixture_path("fsdp/hsdp_4"), 1), folder)
    assert (
        "saves by different numbers of ranks (expected one world size, found 2, 4)" in anyckpt("verify", folder).damage
    )
    (folder / "model_world_size_4_rank_1.pt").unlink()
    (folder / "fsdp_config.json").write_text(json.dumps({"world_size": 4}))
    assert "another number of ranks than their settings" in anyckpt("verify", folder).damage


def test_a_file_of_another_world_under_this_ones_name(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_2", tmp_path)
    shutil.copy(rank_file(fixture_path("fsdp/hsdp_4"), 1), rank_file(folder, 1))
    error = anyckpt("verify", folder).damage
    assert "a mesh of all 2 ranks" in error
    assert "ddp 2 x fsdp 2" in error


def test_one_rank_twice(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_2", tmp_path)
    shutil.copy(rank_file(folder, 0), rank_file(folder, 1))
    error = anyckpt("convert", folder, tmp_path / "o", "--to", "safetensors").error
    assert "tensor 'a': the ranks' parts do not make up the tensor: pieces overlap" in error


def test_a_rank_of_another_model(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_2", tmp_path)
    shutil.copy(rank_file(fixture_path("fsdp/fsdp1_2"), 1), rank_file(folder, 1))
    assert "tensors of different names" in anyckpt("verify", folder).damage


def test_tensor_parallelism_that_cuts_unevenly_is_refused_by_name(tmp_path: Path, anyckpt: Runner) -> None:
    folder = ranks("fsdp_tp_4", tmp_path)
    for rank in range(4):
        shutil.copy(fixture_path("fsdp/uneven_fsdp_tp_rank_1.pt"), rank_file(folder, rank))
    error = anyckpt("convert", folder, tmp_path / "o", "--to", "safetensors").error
    assert "tensor '2.weight': is cut by a _StridedShard whose parts are no boxes" in error
    assert "length 10" in error
