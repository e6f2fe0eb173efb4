"""What is wrong with a layout of ranks is named: the rank, what was expected, and what was found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, open_layout

from anyckpt.errors import FormatError
from anyckpt.formats.megatron_lm import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.pickling import Record

Change = Callable[[dict[Any, Any]], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_fixture("megatron_gpt_tp2_pp2", tmp_path)


def rank(root: Path, name: str = "mp_rank_01_001") -> Path:
    return root / "iter_0000007" / name / FILE


def problem(root: Path) -> str:
    with pytest.raises(FormatError) as error:
        FORMAT.read(look_at(root))
    return str(error.value)


def args(**changes: Any) -> Change:
    def change(contents: dict[Any, Any]) -> None:
        contents["args"].fields().update(changes)

    return change


def test_tracker_that_leads_nowhere(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    assert FORMAT.detect(look_at(root))
    text = problem(root)
    assert "names iter_0000008, which is missing" in text
    assert "iter_0000007" in text


def test_tracker_that_is_empty_or_no_number(root: Path) -> None:
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("")
    assert FORMAT.detect(look_at(root))
    assert "is empty" in problem(root)
    tracker.write_text("latest\n")
    assert "does not name an iteration" in problem(root)
    tracker.write_bytes(b"\xff\xfe7")
    assert "does not name an iteration" in problem(root)
    tracker.write_text("-7")
    assert "does not name an iteration" in problem(root)


def test_tracker_may_end_with_a_line_break(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert open_layout(root).training.step == 7


def test_missing_rank_folder(root: Path) -> None:
    shutil.rmtree(rank(root).parent)
    text = problem(root)
    assert "a rank folder is missing" in text
    assert "mp_rank_01_001" in text
    assert "found 3 rank folders" in text


def test_rank_folder_without_its_file(root: Path) -> None:
    rank(root).unlink()
    text = problem(root)
    assert "mp_rank_01_001" in text
    assert "holds no model" in text


def test_no_ranks_at_all(root: Path) -> None:
    for folder in (root / "iter_0000007").iterdir():
        (folder / FILE).unlink()
    assert not FORMAT.detect(look_at(root))
    assert "holds no ranks" in problem(root / "iter_0000007")


def test_truncated_rank(root: Path) -> None:
    data = rank(root).read_bytes()
    rank(root).write_bytes(data[: len(data) // 2])
    assert "mp_rank_01_001" in problem(root)
    rank(root).write_bytes(b"")
    assert "is empty" in problem(root)


def test_rank_that_is_something_else(root: Path) -> None:
    change_rank(rank(root), lambda contents: [contents.pop(key) for key in list(contents)])
    assert "is not a Megatron-LM rank file" in problem(root)


def test_ranks_of_different_iterations(root: Path) -> None:
    change_rank(rank(root), lambda contents: contents.update(iteration=8))
    text = problem(root)
    assert "ranks are of different iteration" in text
    assert "expected 7 as in mp_rank_00_000" in text
    assert "found 8 in mp_rank_01_001" in text


def test_ranks_of_different_models(root: Path) -> None:
    change_rank(rank(root), args(hidden_size=16))
    assert "ranks disagree on args.hidden_size" in problem(root)
    change_rank(rank(root), args(hidden_size=8, pipeline_model_parallel_layout="Ett|ttL"))
    assert "args.pipeline_model_parallel_layout" in problem(root)
    change_rank(rank(root), args(pipeline_model_parallel_layout=None, pipeline_model_parallel_size=4))
    assert "parallel sizes" in problem(root)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 4}, ["a rank folder is missing", "mp_rank_02_000", "tensor 4 x pipeline 2"]),
        ({"tensor_model_parallel_size": 1}, ["contradict each other", "tensor 1 x pipeline 2", "found tensor 1"]),
        ({"pipeline_model_parallel_size": 1}, ["contradict each other", "0 numbers after", "found 1 numbers"]),
        ({"expert_model_parallel_size": 2}, ["contradict each other", "2 numbers after", "found 1 numbers"]),
        ({"tensor_model_parallel_size": 1 << 15, "pipeline_model_parallel_size": 1 << 15}, ["mp_rank_02_000"]),
        ({"tensor_model_parallel_size": 1 << 40}, ["args.tensor_model_parallel_size is not possible"]),
        ({"tensor_model_parallel_size": "2"}, ["args.tensor_model_parallel_size is not possible"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["chunks", "one chunk 'model'"]),
    ],
)
def test_folders_and_args_contradict_each_other(root: Path, changes: dict[str, Any], words: list[str]) -> None:
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, args(**changes))
    text = problem(root)
    for word in words:
        assert word in text


def test_rank_folder_that_is_there_twice(root: Path) -> None:
    shutil.copytree(rank(root).parent, root / "iter_0000007" / "mp_rank_01_001_000")
    assert "again" in problem(root)


def test_more_chunks_than_the_args_say(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_tp2_pp2_vpp2", tmp_path)

    def third(contents: dict[Any, Any]) -> None:
        contents["model2"] = contents["model1"]

    change_rank(rank(root), third)
    assert "model2" in problem(root)


def test_expert_ranks_that_do_not_fit(tmp_path: Path) -> None:
    root = copy_fixture("megatron_moe_tp2_ep2", tmp_path)
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, args(expert_tensor_parallel_size=3))
    assert "args.expert_tensor_parallel_size is not possible" in problem(root)


def test_unknown_checkpoint_version(root: Path) -> None:
    change_rank(rank(root), lambda contents: contents.update(checkpoint_version=4.0))
    assert "unknown checkpoint_version" in problem(root)
    change_rank(rank(root), lambda contents: contents.update(checkpoint_version="3"))
    assert "unknown checkpoint_version" in problem(root)


def test_iteration_that_is_no_count(root: Path) -> None:
    change_rank(rank(root), lambda contents: contents.update(iteration=-1))
    assert "the iteration is not a count" in problem(root)


def test_weights_that_are_no_tensors(root: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        contents["model"]["decoder.final_layernorm.weight"] = [1.0]

    change_rank(rank(root), change)
    text = problem(root)
    assert "decoder.final_layernorm.weight" in text
    assert "is not a dense tensor" in text


def test_a_norm_in_both_spellings(root: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        model = contents["model"]
        model["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"] = model["decoder.layers.0.pre_mlp_layernorm.weight"]

    change_rank(rank(root), change)
    assert "holds a weight under two names" in problem(root)


def test_folder_of_another_iteration_is_said(root: Path) -> None:
    (root / "iter_0000007").rename(root / "iter_0000009")
    checkpoint = open_layout(root / "iter_0000009")
    assert any("iteration 9" in warning and "7" in warning for warning in checkpoint.warnings)


@pytest.mark.parametrize("heads", [None, 3, "4"])
def test_old_rows_without_a_fitting_number_of_heads(tmp_path: Path, heads: Any) -> None:
    root = copy_fixture("megatron_oldnames_v1", tmp_path)
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, args(num_attention_heads=heads))
    assert "num_attention_heads is needed" in problem(root)
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, args(num_attention_heads=14))
    assert "does not divide into the heads" in problem(root)


def test_model_that_is_nested_without_end(root: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        inner: dict[str, Any] = {}
        inner["again"] = inner
        contents["model"]["deep"] = inner

    change_rank(rank(root), change)
    assert "nested too deep" in problem(root)


def test_args_may_be_any_object(root: Path) -> None:
    """What is no namespace has no fields; the layout is then the folders'."""

    def change(contents: dict[Any, Any]) -> None:
        contents["args"] = Record(contents["args"].type, (1,))

    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, change)
    assert open_layout(root).layout.tensor_parallel == 2
