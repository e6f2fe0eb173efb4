"""What a training run leaves besides weights and moments: where it stood, its scheduler, its random states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.megatron_lm_files import FILE, root_of
from tests.optimizer.rank_files import config_of, matrices, of_slot, ranks_of, wrapped, written
from tests.support import fixture_path

from anyckpt.checkpoint import ParallelLayout
from anyckpt.formats import registry
from anyckpt.formats.shared.random_states import is_random_state, random_states
from anyckpt.operations.convert import Conversion, convert
from anyckpt.operations.reshard import reshard
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.pickling.plain import to_plain
from anyckpt.tensor import LazyTensor, from_array

RANKS = "legacy/megatron_gpt_tp2_pp2"
SAME = LayoutRequest(tensor_parallel=2, pipeline_parallel=2)


def values(state: Any) -> Any:
    """A state with tensors as numbers."""
    if isinstance(state, LazyTensor):
        return state.numpy().tolist()
    if isinstance(state, Mapping):
        return {key: values(part) for key, part in state.items()}
    return [values(part) for part in state] if isinstance(state, (list, tuple)) else to_plain(state)


def said(done: Conversion, name: str) -> str | None:
    return done.ignored.get(name)


def test_random_states_go_where_the_layout_is_the_same(tmp_path: Path) -> None:
    source = fixture_path(RANKS)
    convert(source, tmp_path / "core", to="megatron-core", optimizer="keep")
    core = registry.read(str(tmp_path / "core"))
    assert core.training.has_rng
    convert(tmp_path / "core", tmp_path / "back", to="megatron-lm", optimizer="keep", layout=SAME)
    for path in sorted(source.glob(f"iter_*/*/{FILE}")):
        folder = path.parent.name
        state = values(root_of(path)["rng_state"])
        tensor, pipeline = int(folder[8:10]), int(folder[11:])
        assert values(core.objects[f"rng_state/shard_{pipeline}.{tensor}_2.2"]) == state
        assert values(root_of(tmp_path / "back" / path.relative_to(source))["rng_state"]) == state
    again = reshard(source, tmp_path / "same", layout=LayoutRequest())
    assert not any("--no-load-rng" in note for note in again.notes)


def test_random_states_of_another_layout_are_said_to_be_dropped(tmp_path: Path) -> None:
    done = reshard(fixture_path(RANKS), tmp_path / "out", layout=LayoutRequest(tensor_parallel=1))
    assert "is not carried to another layout" in str([said(done, name) for name in done.ignored if "rng_state" in name])
    assert any("--no-load-rng" in note for note in done.notes)
    assert "rng_state" not in root_of(tmp_path / "out" / "iter_0000007" / "mp_rank_00_000" / FILE)


def test_stages_are_not_taken_for_expert_ranks() -> None:
    """``mp_rank_00_001`` is the second stage in one layout, and the second expert rank in another."""
    name = "mp_rank_00_001/rng_state"
    stage = random_states([name, "args", "rng_tracker_states"], ParallelLayout(pipeline_parallel=2))
    expert = random_states([name], ParallelLayout(expert_parallel=2))
    assert stage == {"rng_state/shard_1.0_2.1": name}
    assert expert == {"rng_state/shard_0.0.1_1.1.2": name}
    assert random_states(["mp_rank_01_002_003/rng_state"], ParallelLayout(2, 4, 1, 8)) == {
        "rng_state/shard_2.1.3_4.2.8": "mp_rank_01_002_003/rng_state"
    }
    assert random_states([name], ParallelLayout()) == {}
    assert not is_random_state(name) and is_random_state("rng_state/shard_1.0_2.1")


@pytest.mark.parametrize("to", ["megatron-core", "megatron-lm"])
def test_megatrons_scheduler_iteration_and_samples_stay(to: str, tmp_path: Path) -> None:
    source = open_checkpoint(fixture_path(RANKS))
    convert(fixture_path(RANKS), tmp_path / "out", to=to, optimizer="keep")
    found = open_checkpoint(tmp_path / "out")
    assert values(found.objects["opt_param_scheduler"]) == values(source.objects["opt_param_scheduler"])
    assert (found.training.step, found.training.consumed_samples) == (7, source.training.consumed_samples)
    assert found.training.has_scheduler and found.training.has_optimizer


@pytest.mark.parametrize("to", ["lightning", "dcp", "megatron-core", "megatron-lm"])
def test_where_nemo_stood(to: str, tmp_path: Path) -> None:
    """NeMo says how many samples were seen in the file's name only."""
    root = written(
        tmp_path / "c", ranks_of("nemo/nemo1_mp_tp2"), config_of("nemo/nemo1_mp_tp2"),
        lambda _, state: [wrapped([state], matrices)],
    )  # fmt: skip
    for path in root.glob("*/*.ckpt"):
        path.rename(path.with_name("m--step=6-consumed_samples=48.0-last.ckpt"))
    out = tmp_path / ("consumed_samples=48.ckpt" if to == "lightning" else "out")
    done = convert(root, out, to=to, optimizer="keep", layout=LayoutRequest(tensor_parallel=1))
    training = open_checkpoint(out).training
    assert training.step == 6
    assert training.consumed_samples == (None if to == "dcp" else 48)
    scheduler = [why for name, why in done.ignored.items() if name == "lr_schedulers"]
    if to == "lightning":
        assert open_checkpoint(out).objects["lr_schedulers"] == [{"last_epoch": 6}] and not scheduler
    elif to != "dcp":
        assert len(scheduler) == 1 and "the state of Lightning's learning-rate schedulers" in scheduler[0]
    assert not any("optimizer" in name for name in done.ignored)


def test_moments_that_ranks_trained_apart_are_said(tmp_path: Path) -> None:
    """A norm's are the same on every tensor-parallel rank, or something went wrong in training."""

    def optimizer(folder: str, state: Any) -> Any:
        own = wrapped([state], matrices)
        if folder == "mp_rank_01":
            last = max(own["optimizer"]["state"])
            before = own["optimizer"]["state"][last]["exp_avg"]
            own["optimizer"]["state"][last]["exp_avg"] = from_array(before.numpy() + np.float32(1))
        return [own]

    root = written(tmp_path / "c", ranks_of("nemo/nemo1_mp_tp2"), config_of("nemo/nemo1_mp_tp2"), optimizer)
    done = convert(root, tmp_path / "out", to="dcp", optimizer="keep")
    (note,) = [note for note in done.notes if "the optimizer's exp_avg" in note]
    assert "differs between ranks" in note and "took that of" in note
    name = note.split(": ", 1)[1].split(" ")[0]
    kept = open_checkpoint(tmp_path / "out").tensors[f"optim.state.{name}.exp_avg"]
    first = open_checkpoint(root).tensors[name]
    assert np.array_equal(kept.numpy(), of_slot("exp_avg", first).numpy())
