"""A run's folder: which of its checkpoints is the newest whole one, and what is done to it as it fills."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import OutputError
from anyckpt.operations import run_upkeep
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_folder import candidates, condition, latest, note_path
from anyckpt.operations.run_upkeep import clean, delete, noted, point_to, published, write_note

HOUR = 3600.0


def save(folder: Path, name: str, step: int, *, to: str = "dcp", metric: float | None = None) -> Path:
    """A checkpoint with a note, as a run leaves it."""
    write_note(str(folder / name), Saved(name, step, 1e9 + step, metric))
    anyckpt.save({"model": {"w": np.full((4, 3), step, np.float32)}, "step": step}, folder / name, to=to)
    return folder / name


def age(path: Path, seconds: float) -> None:
    """Make everything in a directory as old as that."""
    then = time.time() - seconds
    for inner in [*(path.rglob("*") if path.is_dir() else ()), path]:
        os.utime(inner, (then, then), follow_symlinks=False)


# -- which is the newest whole one ---------------------------------------------------------------------------


def test_of_any_format_and_by_any_name(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nothing") is None
    (tmp_path / "events.log").write_text("step-9999 was fine")
    (tmp_path / "step-9999").mkdir()
    for name, step, to in (
        ("step-3", 3, "safetensors"),
        ("iter_0000010", 10, "dcp"),
        ("epoch=1-step=20-v1.ckpt", 20, "torch"),
        ("checkpoint-30", 30, "dcp"),
    ):
        anyckpt.save({"model": {"w": np.ones(3)}, "step": step}, tmp_path / name, to=to)
        assert latest(tmp_path) == str(tmp_path / name)
    anyckpt.save({"w": np.ones(3)}, tmp_path / "export.safetensors", to="safetensors")
    assert latest(tmp_path) == str(tmp_path / "checkpoint-30")
    anyckpt.save({"model": {"w": np.ones(3)}, "step": 40}, tmp_path / "newest.ckpt", to="torch")
    assert latest(tmp_path) == str(tmp_path / "newest.ckpt")  # the checkpoint itself tells its step


def test_averaged_weights_are_no_state_to_go_on_with(tmp_path: Path) -> None:
    for name in ("m-step=3.ckpt", "m-step=3-EMA.ckpt", "alone-step=2-EMA.ckpt"):
        anyckpt.save({"model": {"w": np.ones(3)}}, tmp_path / name, to="torch")
    assert latest(tmp_path) == str(tmp_path / "m-step=3.ckpt")
    (tmp_path / "m-step=3.ckpt").unlink()
    assert latest(tmp_path) == str(tmp_path / "m-step=3-EMA.ckpt")


def test_what_was_looked_at_is_not_kept_open(tmp_path: Path) -> None:
    """Or a trainer would keep the space of its first checkpoint for ever."""
    save(tmp_path, "step-1", 1)
    assert latest(tmp_path) == str(tmp_path / "step-1")
    held = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    assert not [path for path in held if os.path.realpath(path).startswith(str(tmp_path))]


def test_what_the_trainer_said_comes_before_the_name(tmp_path: Path) -> None:
    save(tmp_path, "step-100-of-the-first-try", 5)
    save(tmp_path, "best", 6)
    assert latest(tmp_path) == str(tmp_path / "best")
    assert [(one.name, one.step) for one in candidates(tmp_path)] == [("best", 6), ("step-100-of-the-first-try", 5)]
    Path(note_path(str(tmp_path / "best"))).write_text('{"step": "many"')
    assert latest(tmp_path) == str(tmp_path / "best")  # its own step


@pytest.mark.parametrize(
    ("fixture", "marker"),
    [
        ("mcore/torchdist_plain_w4/ckpt", "metadata.json"),
        ("mcore/torchdist_plain_w4/ckpt", ".metadata"),
        ("mcore/gpt_opt_plain/ckpt", ".metadata"),
        ("mcore/dcp_fsdp_w2/ckpt", ".metadata"),
        ("nemo/nemo2_llama_spm/model", "weights/metadata.json"),
        ("nemo/nemo2_llama_spm/model", "weights/.metadata"),
        ("nemo/lightning_fsdp2/m-step=2.ckpt", ".metadata"),
    ],
)
def test_what_others_did_not_finish_is_known_and_cleaned_up(fixture: str, marker: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    shutil.copytree(fixture_path(fixture), whole)
    shutil.copytree(fixture_path(fixture), broken)
    (broken / marker).unlink()
    assert condition(str(whole)).problem == ""
    assert condition(str(broken)).unfinished
    assert latest(tmp_path) == str(whole)
    assert clean(tmp_path) == []  # somebody may be writing it
    age(broken, 2 * HOUR)
    assert clean(tmp_path, others_after=None) == []
    assert clean(tmp_path) == [str(broken)]
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [whole.name]


def test_what_nemo_marked(tmp_path: Path) -> None:
    whole, marked = save(tmp_path, "step=1.ckpt", 1, to="torch"), save(tmp_path, "step=2.ckpt", 2, to="torch")
    marker = tmp_path / "step=2-unfinished"
    marker.touch()
    assert latest(tmp_path) == str(whole)
    age(marked, 2 * HOUR)
    age(marker, 2 * HOUR)
    assert clean(tmp_path) == [str(marked)]
    assert not marker.exists() and latest(tmp_path) == str(whole)


@pytest.mark.parametrize("fixture", ["mcore/torchdist_plain_w4/ckpt", "legacy/megatron_gpt_tp2_pp2/iter_0000007"])
def test_damage_is_no_reason_to_delete(fixture: str, tmp_path: Path) -> None:
    source = Path(fixture_path(fixture))
    for file in sorted(path.relative_to(source) for path in source.rglob("*") if path.suffix in (".distcp", ".pt")):
        for damage in ("cut", "missing"):
            damaged = tmp_path / damage / "iter_0000009"
            shutil.copytree(source, damaged)
            if damage == "cut":
                os.truncate(damaged / file, (damaged / file).stat().st_size // 2)
            elif file.name != "common.pt":  # it is written first
                (damaged / file).unlink()
            else:
                shutil.rmtree(damaged)
                continue
            age(damaged, 2 * HOUR)
            assert latest(damaged.parent) is None, f"{damage}: {file}"
            assert clean(damaged.parent) == []
            shutil.rmtree(damaged)


def test_a_file_of_the_manifest_is_missing(tmp_path: Path) -> None:
    anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "step-2", to="nemo2")
    older = save(tmp_path, "step-1", 1)
    assert latest(tmp_path) == str(tmp_path / "step-2")
    (tmp_path / "step-2" / "context" / "model.yaml").unlink()
    assert "model.yaml" in condition(str(tmp_path / "step-2")).problem
    assert latest(tmp_path) == str(older)


# -- what is done to it --------------------------------------------------------------------------------------


def test_after_each_publication(tmp_path: Path) -> None:
    rules = Retention(last=1, best=1, forever_every=100)
    shutil.copytree(fixture_path("mcore/dcp_fsdp_w2/ckpt"), tmp_path / "step-1")  # of somebody else: it stays
    gone = []
    for step, metric in ((50, 3.0), (100, 2.0), (150, 5.0), (200, 4.0), (250, 6.0)):
        save(tmp_path, f"step-{step}", step, metric=metric)
        gone += published(str(tmp_path), rules)
        assert os.readlink(tmp_path / "latest") == f"step-{step}"
        assert latest(tmp_path / "latest" / "..") == str(tmp_path / "latest" / ".." / f"step-{step}")
    assert [Path(path).name for path in gone] == ["step-150"]
    assert sorted(one.step for one in noted(str(tmp_path))) == [50, 100, 200, 250]
    assert anyckpt.open(tmp_path / "latest").training.step == 250
    left = {path.name for path in tmp_path.iterdir() if path.name[0] != "."}
    assert left == {"latest", "step-1", "step-50", "step-100", "step-200", "step-250"}


def test_a_run_of_megatron_can_be_resumed_by_megatron(tmp_path: Path) -> None:
    save(tmp_path, "iter_0000020", 20)
    published(str(tmp_path), Retention())
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "20"


def test_nothing_but_a_link_is_replaced_by_the_pointer(tmp_path: Path) -> None:
    save(tmp_path, "step-1", 1)
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(OutputError, match="cannot point to step-1"):
        point_to(str(tmp_path), "step-1")
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert published(str(tmp_path), Retention(), pointer=False) == []


class _KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("to", ["dcp", "torch"])
def test_a_kill_in_mid_delete_leaves_nothing_that_looks_whole(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in range(40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        name = "step-1" if to == "dcp" else "step-1.ckpt"
        doomed = save(folder, name, 1, to=to)
        steps = [moment]

        def stop(real: Any, steps: list[int] = steps) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                steps[0] -= 1
                if steps[0] < 0:
                    raise _KilledError
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for function in ("rename", "unlink", "rmdir", "fsync"):
                patch.setattr(os, function, stop(getattr(os, function)))
            try:
                delete(str(doomed))
            except _KilledError:
                killed = True
            else:
                killed = False
        there = latest(folder)
        assert there is None or np.array_equal(np.asarray(anyckpt.open(there)["model.w"]), np.ones((4, 3)))
        assert there is not None or not doomed.exists()
        for left in folder.iterdir():
            age(left, 2 * HOUR)
        clean(folder)
        assert latest(folder) == there
        if there is None:
            assert [path.name for path in folder.iterdir()] in ([], [".anyckpt-run.lock"])
        if not killed:
            assert moment > 3
            return
    raise AssertionError("it is never deleted")


def test_partial_saves_go_when_nobody_is_at_them(tmp_path: Path) -> None:
    partial = tmp_path / ".step-1.anyckpt-partial"
    (partial / "output").mkdir(parents=True)
    held = os.open(partial / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_SH)
    code = f"from anyckpt.operations.run_upkeep import clean; print(clean({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"
    os.close(held)
    assert clean(tmp_path) == [str(partial)]
    assert clean(tmp_path) == []
    assert not StagingDirectory(str(tmp_path / "step-1")).remove_abandoned()


def test_notes_of_what_never_came(tmp_path: Path) -> None:
    write_note(str(tmp_path / "step-1"), Saved("step-1", 1, 0.0))
    note = Path(note_path(str(tmp_path / "step-1")))
    assert noted(str(tmp_path)) == [] and clean(tmp_path) == [] and note.exists()
    age(note, 2 * run_upkeep.OTHERS_AFTER)
    assert clean(tmp_path) == [str(note)]


def test_two_runs_take_turns(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, f"step-{step}", step)
    code = (
        "from anyckpt.operations.run_upkeep import published; from anyckpt.operations.retention import Retention;"
        f"published({str(tmp_path)!r}, Retention(last=3))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert sorted(one.step for one in noted(str(tmp_path))) == [6, 7, 8]
