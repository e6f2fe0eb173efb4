"""``--optimizer keep``: an optimizer's state through other names, formats and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import expected_of, fixture_path, sha256_of

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import MappingError, UsageError
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.optimizer.read import with_optimizer

RANKS = ["legacy/megatron_gpt_tp2_pp2", "legacy/megatron_distopt_tp2_dp2", "legacy/megatron_gpt_fp32_optim_tp2"]


def state_of(path: Path) -> OptimizerState:
    found = with_optimizer(open_checkpoint(path)).optimizer
    assert found is not None
    return found()


def slots(path: Path) -> dict[str, dict[str, str]]:
    return {slot: {n: sha256_of(t) for n, t in tensors.items()} for slot, tensors in state_of(path).slots.items()}


@pytest.mark.parametrize("fixture", RANKS)
@pytest.mark.parametrize("through", ["megatron-core", "dcp", "lightning"])
def test_ranks_through_another_format_and_back(fixture: str, through: str, tmp_path: Path) -> None:
    source = fixture_path(fixture)
    layout = open_checkpoint(source).layout
    middle = tmp_path / ("middle.ckpt" if through == "lightning" else "middle")
    done = convert(source, middle, to=through, optimizer="keep")
    assert not any("optimizer.state" in name for name in done.ignored)
    state = state_of(middle)
    assert state.step == expected_of(fixture)["optimizer_step"]
    if through != "megatron-core":
        names = {n.removeprefix("state_dict.") for tensors in state.slots.values() for n in tensors}
        assert names == {n for tensors in state_of(source).slots.values() for n in tensors}
        return
    request = LayoutRequest(tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel)
    convert(middle, tmp_path / "back", to="megatron-lm", optimizer="keep", layout=request)
    before, after = slots(source), slots(tmp_path / "back")
    for slot, tensors in before.items():
        assert after[slot] == tensors


def test_what_was_distributed_is_no_longer(tmp_path: Path) -> None:
    """Rank files get the state of the optimizer that is not distributed, and say so."""
    source = fixture_path("legacy/megatron_distopt_tp2_dp2")
    kept = convert(source, tmp_path / "kept", to="megatron-lm", optimizer="keep")
    assert any("without --use-distributed-optimizer" in note for note in kept.notes)
    dropped = convert(source, tmp_path / "dropped", to="megatron-lm")
    assert not any("distributed-optimizer" in note for note in dropped.notes)


def test_a_format_without_place_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for optimizer state.*--optimizer drop"):
        convert(fixture_path(RANKS[0]), tmp_path / "out", to="safetensors", optimizer="keep")
    done = convert(fixture_path(RANKS[0]), tmp_path / "out", to="safetensors")
    assert "optimizer" in done.ignored


def test_state_that_fits_two_ways_is_refused(tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_opt_dp_zero_dp2") / "ckpt"
    with pytest.raises(MappingError, match="--optimizer drop"):
        convert(source, tmp_path / "out", to="megatron-lm", optimizer="keep")
    assert list(tmp_path.iterdir()) == []


def test_state_gets_the_targets_form_where_names_stay(tmp_path: Path) -> None:
    """A Lightning file numbers what a distributed checkpoint names; neither would find the other's."""
    source = fixture_path("legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt")
    convert(source, tmp_path / "dcp", to="dcp", optimizer="keep")
    names = [name for name in open_checkpoint(tmp_path / "dcp").tensors if "exp_avg" in name]
    assert names and all(name.startswith("optim.state.") for name in names)
    convert(tmp_path / "dcp", tmp_path / "back.ckpt", to="lightning", optimizer="keep")
    assert open_checkpoint(tmp_path / "back.ckpt").training.has_optimizer

    def whole(path: Path) -> dict[str, dict[str, str]]:
        found = {slot: {n: sha256_of(t) for n, t in own.items()} for slot, own in state_of(path).slots.items()}
        return {
            slot: {n.removeprefix("state_dict."): digest for n, digest in own.items()} for slot, own in found.items()
        }

    before, after = whole(source), whole(tmp_path / "back.ckpt")
    assert {slot: after[slot] for slot in before} == before


def test_state_stays_as_it_is_stored_where_names_do(tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_opt_plain") / "ckpt"
    convert(source, tmp_path / "copy", to="megatron-core", optimizer="keep")
    original: Checkpoint = open_checkpoint(source)
    copied = open_checkpoint(tmp_path / "copy")
    assert {n: sha256_of(t) for n, t in original.tensors.items()} == {
        n: sha256_of(t) for n, t in copied.tensors.items()
    }
