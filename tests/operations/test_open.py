"""Checkpoints of one file per rank, joined into one model and cut again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, open_layout, root_of
from tests.formats.test_megatron_lm_reader import MCORE
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, sha256_of, write_plan

from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_lm import FORMAT
from anyckpt.layout import Parallelism
from anyckpt.layout.from_run import args_from_parallelism
from anyckpt.models.dialects.rank_names import fuse_norms
from anyckpt.operations.steps.cutting import cut_for_ranks
from anyckpt.operations.steps.joining import join_ranks, open_checkpoint, parallelism_of

OLD = tuple(f"oldnames_v{version}" for version in range(4))


def hub_spelling(expected: dict[str, Any]) -> dict[str, Any]:
    """The fixtures' names are those of local layers and sequential experts."""
    fused = fuse_norms(expected)
    renamed = {}
    for name, facts in fused.items():
        head, experts, rest = name.partition(".experts.local_experts.")
        if experts:
            index, _, rest = rest.partition(".")
            name = f"{head}.experts.{rest}{index}"
        renamed[name] = facts
    return renamed


@pytest.mark.parametrize("name", [*MCORE, *OLD])
def test_joined_tensors_are_the_model(name: str) -> None:
    expected = expected_of(f"legacy/megatron_{name}")
    checkpoint = open_checkpoint(fixture_path(f"legacy/megatron_{name}"))
    weights = expected.get("global_tensors") or expected["global_tensors_mcore_names"]
    assert_tensors_equal_expected(checkpoint.tensors, hub_spelling(weights))
    assert (checkpoint.dialect, checkpoint.ranks, checkpoint.warnings) == ("hub", (), [])
    assert checkpoint.format == "megatron-lm"


@pytest.mark.parametrize("name", MCORE)
def test_cutting_again_gives_the_rank_files(name: str, tmp_path: Path) -> None:
    source = fixture_path(f"legacy/megatron_{name}")
    checkpoint = open_checkpoint(source)
    assert FORMAT.plan is not None
    output = write_plan(
        FORMAT.plan(cut_for_ranks(checkpoint, parallelism_of(checkpoint)), WriteOptions()), tmp_path / "out"
    )
    theirs = sorted(path.relative_to(source) for path in source.glob(f"*/*/{FILE}"))
    assert sorted(path.relative_to(output) for path in output.glob("*/*/*")) == theirs
    for path in theirs:
        new, old = root_of(output / path), root_of(source / path)
        models = [key for key in old if key.startswith("model")]
        assert [key for key in new if key.startswith("model")] == models
        assert ("optimizer" in new) == ("optimizer" in old)
        for key in models:
            assert list(new[key]) == list(old[key])
            for tensor, value in old[key].items():
                if value is not None:
                    ours = new[key][tensor]
                    assert (ours.dtype, ours.shape, sha256_of(ours)) == (value.dtype, value.shape, sha256_of(value))
        described = args_from_parallelism(parallelism_of(open_layout(source)))
        assert {key: new["args"].fields()[key] for key in described} == {
            key: old["args"].fields()[key] for key in described
        }


@pytest.mark.parametrize(
    ("name", "parallelism"),
    [
        ("gpt_tp2_pp2", Parallelism(tensor_parallel=4)),
        ("gpt_tp2_pp2", Parallelism(pipeline_parallel=2, virtual_pipeline=2)),
        ("gpt_pp3_uneven", Parallelism(tensor_parallel=2, pipeline_parallel=6)),
        ("moe_tp2_ep2", Parallelism(expert_parallel=4)),
        ("moe_tp2_ep2", Parallelism(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1)),
        ("oldnames_v0", Parallelism(tensor_parallel=4, pipeline_parallel=2)),
    ],
)
def test_another_layout_holds_the_same_model(name: str, parallelism: Parallelism, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fixture_path(f"legacy/megatron_{name}"))
    assert FORMAT.plan is not None
    output = write_plan(FORMAT.plan(cut_for_ranks(checkpoint, parallelism), WriteOptions()), tmp_path / "out")
    again = open_checkpoint(output)
    assert again.layout.tensor_parallel == parallelism.tensor_parallel
    assert {k: sha256_of(v) for k, v in again.tensors.items()} == {
        k: sha256_of(v) for k, v in checkpoint.tensors.items()
    }


def test_a_whole_checkpoint_is_left_as_it_is() -> None:
    checkpoint = open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    assert join_ranks(checkpoint) is checkpoint
    assert all("optimizer" not in name for name in checkpoint.tensors)


Change = Callable[[dict[Any, Any]], None]


def model(change: Change) -> Change:
    return lambda contents: change(contents["model"])


def drop(name: str) -> Change:
    return model(lambda weights: weights.pop(name))


def copy(name: str, other: str) -> Change:
    return model(lambda weights: weights.update({other: weights[name]}))


@pytest.mark.parametrize(
    ("name", "rank", "change", "words"),
    [
        ("gpt_tp2_pp2", "mp_rank_01_001", drop("decoder.layers.0.mlp.linear_fc2.weight"), "linear_fc2"),
        (
            "gpt_tp2_pp2",
            "mp_rank_01_001",
            model(lambda weights: [weights.pop(key) for key in list(weights) if "layers.1." in key]),
            "layers",
        ),
        (
            "gpt_tp2_pp2",
            "mp_rank_00_000",
            copy("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.2.mlp.linear_fc2.weight"),
            "layers",
        ),
        (
            "moe_tp2_ep2",
            "mp_rank_00_001",
            model(lambda weights: [weights.pop(k) for k in list(weights) if "1.mlp.experts.local_experts.1" in k]),
            "expert",
        ),
        (
            "moe_tp2_ep2",
            "mp_rank_00_001",
            copy(
                "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
                "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight",
            ),
            "expert",
        ),
        (
            "gpt_tp2_pp2",
            "mp_rank_01_001",
            lambda contents: contents["args"].fields().update(padded_vocab_size=128),
            "padded_vocab_size",
        ),
    ],
)  # fmt: skip
def test_incomplete_models_are_refused(name: str, rank: str, change: Change, words: str, tmp_path: Path) -> None:
    root = copy_fixture(f"megatron_{name}", tmp_path)
    change_rank(root / "iter_0000007" / rank / FILE, change)
    with pytest.raises(AnyckptError, match=words):
        open_checkpoint(root)


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_pp2_vpp2_layout", tmp_path)
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, lambda contents: contents["args"].fields().update(pipeline_model_parallel_layout="Et|t|t|tL"))
    with pytest.raises(AnyckptError, match="layout"):
        open_checkpoint(root)


def test_arguments_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_pp3_uneven", tmp_path)
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, lambda contents: contents["args"].fields().update(num_layers="5"))
    with pytest.raises(MappingError, match=r"args.*num_layers"):
        open_checkpoint(root)


def test_ranks_without_a_configuration_of_ranks_are_refused() -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_pp3_uneven"))
    with pytest.raises(UsageError, match="no layout of ranks"):
        join_ranks(replace(checkpoint, config_kind="hf"))


def test_a_copy_of_the_model_elsewhere_is_not_needed(tmp_path: Path) -> None:
    """A root may be moved: nothing in it says where it was."""
    moved = Path(shutil.copytree(fixture_path("legacy/megatron_oldnames_v1"), tmp_path / "elsewhere"))
    assert len(open_checkpoint(moved).tensors) == 28
