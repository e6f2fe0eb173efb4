"""Safetensors files of one rank each, as torch's ``HuggingFaceStorageWriter`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cli.runner import Runner
from tests.support import file_bytes, fixture_path

from anyckpt import convert, diff
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.formats import registry
from anyckpt.tensor import from_array

Boxes = Mapping[str, tuple[tuple[int, ...], Any]]
WHOLE = {
    "model.embed_tokens.weight": np.arange(28, dtype=np.float32).reshape(7, 4),
    "model.norm.weight": np.arange(5, dtype=np.float16),
}
CONFIG = {"model_type": "nobodys", "vocab_size": 7}


@pytest.fixture
def anyckpt(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def write(path: Path, boxes: Boxes) -> None:
    stated = json.dumps({name: {"saved_offsets": [*start]} for name, (start, _) in boxes.items()})
    metadata = {"DCP_SHARDING_INFO": stated, "DCP_VERSION": "1.0", "format": "pt"}
    tensors = {name: from_array(array) for name, (_, array) in boxes.items()}
    path.write_bytes(file_bytes(OutputFile("", safetensors_parts(tensors, metadata))))


def shard(rank: int, files: int = 1) -> str:
    return f"shard-{rank:05d}-model-00001-of-{files:05d}.safetensors"


def model(to: Path, ranks: int = 2) -> Path:
    """Cut along the first axis as ``torch.chunk`` does, the last part short or not written."""
    folder = to / "model"
    folder.mkdir()
    for rank in range(ranks):
        boxes = {}
        for name, array in WHOLE.items():
            step = -(-len(array) // ranks)
            own = array[step * rank : step * (rank + 1)]
            if len(own):
                boxes[name] = ((step * rank, *[0] * (array.ndim - 1)), own)
        write(folder / shard(rank + 1), boxes)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_are_joined(ranks: int, tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path, ranks)
    opened = registry.read(folder)
    assert {name: tensor.numpy().tolist() for name, tensor in opened.tensors.items()} == {
        name: array.tolist() for name, array in WHOLE.items()
    }
    assert opened.details["world_size"] == ranks
    assert anyckpt("verify", folder).code == 0
    assert anyckpt("convert", folder, tmp_path / "out", "--to", "hf").code == 0
    assert b"DCP_SHARDING_INFO" not in (tmp_path / "out/model.safetensors").read_bytes()
    assert anyckpt("diff", folder, tmp_path / "out").code == 0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_grid_of_any_cuts_is_joined(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], columns: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    whole = np.arange(sum(rows) * sum(columns), dtype=np.int32).reshape(sum(rows), sum(columns))
    rank = 0
    for row, height in enumerate(rows):
        for column, width in enumerate(columns):
            rank += 1
            start = (sum(rows[:row]), sum(columns[:column]))
            own = np.ascontiguousarray(whole[start[0] : start[0] + height, start[1] : start[1] + width])
            write(folder / shard(rank), {"w": (start, own)})
    assert registry.read(folder).tensors["w"].numpy().tolist() == whole.tolist()


def test_configuration_beside_as_automodel_keeps_it(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / ".hf_metadata").mkdir()
    (folder / "config.json").rename(folder / ".hf_metadata/config.json")
    (folder / ".hf_metadata/fqn_to_file_index_mapping.json").write_text(json.dumps(dict.fromkeys(WHOLE, 1)))
    opened = registry.read(folder)
    assert opened.config == CONFIG
    assert not opened.artifacts
    assert not opened.warnings
    (folder / ".hf_metadata/fqn_to_file_index_mapping.json").write_text('{"lm_head.weight": 1}')
    with pytest.raises(Exception, match="tensor 'lm_head.weight': 1 tensors of the model's list are in no rank's file"):
        registry.read(folder)


@pytest.mark.parametrize("name", [shard(1), shard(2), "renamed.safetensors"])
def test_one_file_is_no_model(name: str, tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    path = folder / name
    if not path.exists():
        (folder / shard(2)).rename(path)
    shown = anyckpt("inspect", path)
    assert shown.code == 0
    assert "no whole model" in shown.err
    assert "no whole model" in anyckpt("convert", path, tmp_path / "out", "--to", "safetensors").error
    assert anyckpt("verify", path).code == 1


def test_one_file_under_a_whole_models_name(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    (folder / shard(2)).rename(folder / "model.safetensors")
    assert "one rank's part and no whole model" in anyckpt("convert", folder, tmp_path / "out", "--to", "hf").error


def test_a_missing_rank(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path, 3)
    (folder / shard(2)).unlink()
    assert "1 of 3 ranks are missing, such as shard-00002-model-*-of-00001" in anyckpt("verify", folder).damage


def test_missing_last_ranks_show_against_the_vocabulary(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path, 3)
    (folder / shard(3)).unlink()
    error = anyckpt("convert", folder, tmp_path / "out", "--to", "hf").error
    assert "tensor 'model.embed_tokens.weight': the files of the last ranks are missing" in error
    (folder / "config.json").unlink()
    assert "how many ranks wrote the files" in anyckpt("inspect", folder).err
    (folder / shard(2)).unlink()
    assert "nothing proves that no other wrote a part" in anyckpt("convert", folder, tmp_path / "o", "--to", "hf").error
    assert anyckpt("verify", folder).code == 1


def test_parts_that_overlap_or_leave_gaps(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    array = WHOLE["model.embed_tokens.weight"]
    for start, problem in (((3, 0), "pieces overlap"), ((5, 0), "pieces are missing")):
        write(folder / shard(2), {"model.embed_tokens.weight": (start, array[3:])})
        error = anyckpt("verify", folder).damage
        assert "tensor 'model.embed_tokens.weight': the ranks' parts do not make up the tensor" in error
        assert problem in error


def test_a_rank_of_another_save(tmp_path: Path, anyckpt: Runner) -> None:
    folder = model(tmp_path)
    (folder / shard(2)).rename(folder / shard(2, 2))
    assert "rank files of several saves" in anyckpt("verify", folder).damage


@pytest.mark.parametrize(
    "stated",
    ["", "[]", "{}", '{"w": 1}', '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [-1, 0]}}', "[" * 9999],
)
def test_what_the_header_says_is_not_trusted(stated: str, tmp_path: Path, anyckpt: Runner) -> None:
    metadata = {"DCP_SHARDING_INFO": stated}
    parts = safetensors_parts({"w": from_array(np.zeros((2, 2), np.float32))}, metadata)
    (tmp_path / shard(1)).write_bytes(file_bytes(OutputFile("", parts)))
    for path in (tmp_path, tmp_path / shard(1)):
        assert "its header does not say where" in anyckpt("inspect", path).error


@pytest.mark.parametrize("limit", [None, "100KB"])
def test_what_is_written_by_rank_is_read_whole(limit: str | None, tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    convert(source, tmp_path / "model", to="hf", sharded=True, max_shard_size=limit)
    there = sorted(
        str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()
    )
    weights = [name for name in there if name.startswith("shard-00001-model-")]
    assert len(weights) == (1 if limit is None else 4)
    assert {".hf_metadata/config.json", ".hf_metadata/tokenizer.json"} <= {*there}
    assert not {"config.json", "model.safetensors"} & {*there}
    assert diff(tmp_path / "model", source).equal
    convert(tmp_path / "model", tmp_path / "consolidated", to="hf")
    assert diff(tmp_path / "consolidated", source).equal
    assert (tmp_path / "consolidated" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
