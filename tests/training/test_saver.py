"""Saving while training goes on: what is written, what fails, and what is left then."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

import anyckpt
from anyckpt.errors import AnyckptError

pytestmark = pytest.mark.peer


def state_of(step: int, rows: int = 64) -> dict[str, Any]:
    """A state of which every element tells the step, spread over the ranks if there are several."""
    import torch
    import torch.distributed as dist

    full = torch.full((rows, 6), float(step))
    if dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        full = distribute_tensor(full, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return {"model": {"w": full, "alike": torch.full((5,), step)}, "step": step}


def assert_is(path: str | None, step: int) -> None:
    """Whether a checkpoint is whole and of a step."""
    import numpy as np

    assert path is not None
    assert anyckpt.verify(path), anyckpt.verify(path).problems
    found = anyckpt.open(path)
    values = {float(value) for name in found for value in np.unique(np.asarray(found[name]))}
    assert values == {float(step)}, (path, values)


def visible(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def changed(state: dict[str, Any]) -> None:
    """As an optimizer does it, at once."""
    for tensor in state["model"].values():
        getattr(tensor, "_local_tensor", tensor).fill_(-1)


# -- what is written -----------------------------------------------------------------------------------------


def steps_of_a_run(folder: str, settings: dict[str, Any]) -> list[str]:
    from anyckpt.torch import Retention, Saver, latest

    with Saver(folder, keep=Retention(last=2, best=1, forever_every=4), **settings) as saver:
        assert saver.latest() is None
        for step in range(1, 6):
            state = state_of(step)
            path = saver.save(state, step, metric=abs(step - 3))
            changed(state)
            assert path.endswith(f"step-{step}") and path in saver.pending
        saver.wait()
        assert saver.pending == ()
        newest = saver.latest()
        assert newest == latest(folder) == path
    assert_is(newest, 5)
    return visible(folder)


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {}),
        (2, {}),
        (2, {"in_flight": 1, "format": "megatron-core"}),
        (2, {"format": "safetensors", "max_shard_size": 1000}),
        (2, {"assume_constant_structure": False}),
    ],
    ids=["alone", "dcp", "megatron", "safetensors", "planned"],
)
def test_a_run(world: int, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = str(tmp_path)
    left = ["latest", *(f"step-{step}" for step in (1, 3, 4, 5))]
    assert on_ranks(world, steps_of_a_run, folder, settings)[0] == left
    for step in (1, 3, 4, 5):
        assert_is(os.path.join(folder, f"step-{step}"), step)
    assert os.readlink(tmp_path / "latest") == "step-5"
    assert not [name for name in os.listdir(folder) if name.endswith(("partial", "deleted", "new"))]


def loaded_by_torch(folder: str) -> float:
    import torch.distributed.checkpoint as dcp

    from anyckpt.torch import Saver

    with Saver(folder, name="iter_{step:07d}") as saver:
        saver.save(state_of(5), 5)
    state = state_of(0)
    dcp.load(state, checkpoint_id=os.path.join(folder, "latest"))
    assert state["step"] == 5
    return float(state["model"]["w"].to_local().mean() + state["model"]["alike"].float().mean())


def test_what_torch_loads_and_megatron_finds(tmp_path: Path) -> None:
    assert on_ranks(2, loaded_by_torch, str(tmp_path)) == [10.0, 10.0]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"


def growing(folder: str) -> None:
    """The plan is used again as long as it fits, and made again when it does not."""
    from anyckpt.torch import Saver

    with Saver(folder) as saver:
        for step, rows in enumerate((64, 64, 64, 32, 32, 64, 64), 1):
            state = state_of(step, rows)
            if step > 5:
                state["step"] = 10**9 + step  # takes more room
                state["model"]["more"] = state["model"]["alike"].clone()
            saver.save(state, step)
            changed(state)


def test_a_state_that_changes_its_shape(tmp_path: Path) -> None:
    on_ranks(2, growing, str(tmp_path))
    for step, rows in enumerate((64, 64, 64, 32, 32, 64, 64), 1):
        found = anyckpt.open(tmp_path / f"step-{step}")
        assert found["model.w"].shape == (rows, 6)
        assert ("model.more" in found) == (step > 5)
        assert_is(str(tmp_path / f"step-{step}"), step)


def resumed(folder: str) -> list[str]:
    from anyckpt.torch import Saver

    with Saver(folder) as saver:
        for step in (1, 2):
            saver.save(state_of(step), step)
    with Saver(folder) as saver:
        newest = saver.latest()
        assert newest is not None
        saver.save(state_of(2, rows=32), 2)  # the same step again
    return [newest, *visible(folder)]


def test_a_run_that_saves_a_step_again(tmp_path: Path) -> None:
    newest = str(tmp_path / "step-2")
    assert on_ranks(2, resumed, str(tmp_path))[1] == [newest, "latest", "step-1", "step-2"]
    assert_is(newest, 2)
    assert anyckpt.open(newest)["model.w"].shape == (32, 6)


def tensors_of_every_kind(folder: str) -> list[str]:
    import torch

    from anyckpt.torch import Saver, load

    whole = torch.randn(40, 30)
    state = {
        "whole": whole,
        "rows": whole[3:7],
        "column": whole[:, 2],
        "transposed": whole.T,
        "repeated": torch.randn(1, 5).expand(4, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "narrow": torch.randn(9).to(torch.float8_e4m3fn),
        "brain": torch.randn(3, 3).bfloat16(),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
    }
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with Saver(folder) as saver:
        path = saver.save(state, 1)
        whole.fill_(-1)
    found = load(path)
    return [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype
        or found[name].shape != tensor.shape
        or found[name].reshape(-1).tolist() != tensor.reshape(-1).tolist()
    ]


def test_tensors_of_every_kind_are_copied(tmp_path: Path) -> None:
    assert on_ranks(1, tensors_of_every_kind, str(tmp_path)) == [[]]


def one_by_one(folder: str) -> list[str]:
    from anyckpt.torch import async_save

    handles, told = [], []
    for step in (1, 2, 2):
        state = state_of(step)
        try:
            handles.append(async_save(state, os.path.join(folder, f"step-{step}"), overwrite=False))
        except AnyckptError as error:
            told.append(str(error))
        changed(state)
        if handles[1:]:
            handles[1].wait()
    assert handles[0].done()
    assert [handle.wait() for handle in handles] == [handle.path for handle in handles]
    return told


@pytest.mark.parametrize("world", [1, 2])
def test_single_saves_in_the_background(world: int, tmp_path: Path) -> None:
    for told in on_ranks(world, one_by_one, str(tmp_path)):
        assert len(told) == 1 and "step-2: already exists" in told[0]
    for step in (1, 2):
        assert_is(str(tmp_path / f"step-{step}"), step)


def saved_by_the_option(folder: str, option: str) -> list[bool]:
    from anyckpt.torch import Options, save

    state = state_of(4)
    options = Options.of({option: True})
    report = save(state, os.path.join(folder, option), options)
    changed(state)
    assert report.handle is not None and report.bytes_total > 0 and report.format == "dcp"
    path = report.handle.wait()
    again = save(state_of(4), os.path.join(folder, f"{option}-again"))
    return [path == report.path, again.handle is None]


@pytest.mark.parametrize("option", ["asynchronous", "async_save", "ckpt_async_save"])
def test_the_option_of_saving_and_its_other_names(option: str, tmp_path: Path) -> None:
    assert on_ranks(2, saved_by_the_option, str(tmp_path), option) == [[True, True]] * 2
    assert_is(str(tmp_path / option), 4)
    assert_is(str(tmp_path / f"{option}-again"), 4)


# -- what fails ----------------------------------------------------------------------------------------------


def out_of_order(pieces: Any) -> None:
    raise RuntimeError("an accelerator is out of order")


def failing_once(folder: str, fault: str) -> list[str]:
    """Saves of which the second fails on the last rank; gives the errors of each call, and what is there."""
    import torch.distributed as dist

    from anyckpt.torch import Saver
    from anyckpt.torch.copying import copy

    rank = dist.get_rank() if dist.is_initialized() else 0
    last = rank == (dist.get_world_size() if dist.is_initialized() else 1) - 1
    told: list[str] = []
    if fault == "disk" and last:  # its writer can write no file beyond this
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    saver = Saver(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for step, rows in ((1, 64), (2, 64_000 if fault == "disk" else 64), (3, 64), (4, 64)):
        try:
            if fault == "kill" and step == 2 and last:
                pid = saver._writer.pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
            state = state_of(step, rows)
            if fault == "state" and step == 2 and last:
                state["model"]["w"] = "no tensor"
            if fault == "copy" and last:
                saver._writer._copy = out_of_order if step == 2 else copy
            saver.save(state, step)
            if fault == "kill" and step == 2 and last:
                os.kill(pid, signal.SIGKILL)
            saver.wait()
        except AnyckptError as error:
            told.append(f"{step}: {type(error).__name__}: {error}")
    saver.close()
    return [*told, *visible(folder), *(name for name in os.listdir(folder) if name.endswith("partial"))]


@pytest.mark.parametrize(
    ("world", "fault", "words"),
    [
        (1, "disk", "File too large"),
        (2, "disk", "File too large"),
        (2, "kill", "by SIGKILL"),
        (2, "state", "'model.w'"),
        (2, "copy", "out of order"),
    ],
)
def test_a_save_that_fails_on_one_rank(world: int, fault: str, words: str, tmp_path: Path) -> None:
    for told in on_ranks(world, failing_once, str(tmp_path), fault):
        assert told[0].startswith("2: ") and words in told[0], told
        assert told[1:] == ["latest", "step-1", "step-3", "step-4"]
    for step in (1, 3, 4):
        assert_is(str(tmp_path / f"step-{step}"), step)


def told_later(folder: str) -> str:
    """An error surfaces at the next call, whichever that is."""
    from anyckpt.torch import Saver

    saver = Saver(folder, overwrite=False)
    Path(folder, "step-1").mkdir(exist_ok=True)
    time.sleep(0.1)
    try:
        saver.save(state_of(1), 1)
        saver.close()
    except AnyckptError as error:
        return str(error)
    finally:
        saver.close()
    return ""


def test_what_is_there_is_kept_if_that_is_asked(tmp_path: Path) -> None:
    for told in on_ranks(2, told_later, str(tmp_path)):
        assert "already exists" in told


def after_a_job_that_is_not_quite_gone(folder: str) -> float:
    import fcntl
    import threading

    import torch.distributed as dist

    from anyckpt.torch import Saver

    if dist.get_rank() == 0:
        partial = Path(folder, ".step-1.anyckpt-partial")
        partial.mkdir()
        held = os.open(partial / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(held, fcntl.LOCK_SH)
        threading.Timer(0.5, os.close, [held]).start()
    dist.barrier()
    started = time.monotonic()
    with Saver(folder) as saver:
        saver.save(state_of(1), 1)
        return time.monotonic() - started


def test_what_a_killed_job_still_writes_is_waited_for(tmp_path: Path) -> None:
    assert min(on_ranks(2, after_a_job_that_is_not_quite_gone, str(tmp_path))) > 0.5
    assert_is(str(tmp_path / "step-1"), 1)


def test_a_program_that_ends_without_closing(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from anyckpt.torch import Saver; saver = Saver(sys.argv[1]);"
        "saver.save({'model': {'w': torch.full((1 << 20,), 3.0)}, 'step': 3}, 3); raise SystemExit(5)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment).returncode == 5
    assert_is(str(tmp_path / "step-3"), 3)
    assert os.readlink(tmp_path / "latest") == "step-3"


def different_steps(folder: str) -> str:
    import torch.distributed as dist

    from anyckpt.torch import Saver

    with Saver(folder) as saver:
        try:
            saver.save(state_of(1), 1 + dist.get_rank())
        except AnyckptError as error:
            return str(error)
    return ""


def test_ranks_at_different_steps(tmp_path: Path) -> None:
    for told in on_ranks(2, different_steps, str(tmp_path)):
        assert "ranks save different steps" in told and "[1, 2]" in told
    assert visible(str(tmp_path)) == []


def leaving_by_an_error(folder: str) -> str:
    import torch.distributed as dist

    from anyckpt.torch import Saver

    with suppress(RuntimeError), Saver(folder) as saver:
        saver.save(state_of(1), 1)
        if dist.get_rank() == 1:
            raise RuntimeError("this rank stops")
        return "on"
    return "stopped"


def test_a_rank_that_leaves_by_an_error_writes_its_part(tmp_path: Path) -> None:
    """It asks nobody; what it had begun comes if the others' parts do."""
    from tests.training.ranks import outcomes

    first, second = outcomes(2, leaving_by_an_error, str(tmp_path), seconds=12)
    assert second.value == "stopped"
    assert "did not come" in str(first.error)  # it wanted to close together
    assert_is(str(tmp_path / "step-1"), 1)


def test_what_cannot_be(tmp_path: Path) -> None:
    from anyckpt.torch import Saver

    with pytest.raises(AnyckptError, match="does not tell its step"):
        Saver(tmp_path, name="checkpoint")
    with pytest.raises(AnyckptError, match="is no name for checkpoints"):
        Saver(tmp_path, name="{iteration}")
    with pytest.raises(AnyckptError, match="in_flight of at least 1"):
        Saver(tmp_path, in_flight=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnyckptError, match="file.*cannot be made"):
        Saver(tmp_path / "file" / "inside")
    saver = Saver(tmp_path / "new")
    saver.close()
    saver.close()
    with pytest.raises(AnyckptError, match="is closed"):
        saver.save({}, 1)


# -- devices -------------------------------------------------------------------------------------------------


def test_pages_are_locked_and_unlocked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's calls: there is no device here."""
    import torch

    from anyckpt.torch.copying import PageLockedMemory

    locked: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            assert address not in locked
            locked[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            del locked[address]
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime())
    memory = PageLockedMemory()
    for nbytes in (5000, 4000, 9000):
        memory.reserve(nbytes)[:3] = b"abc"
        assert list(locked.values()) == [memory.nbytes]
    memory.close()
    assert locked == {}
