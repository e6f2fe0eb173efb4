"""A process that writes while the state changes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import anyckpt
from anyckpt.dtypes import dtype
from anyckpt.engine.copied import Copies
from anyckpt.engine.destination import Share
from anyckpt.engine.plan import Literal, OutputFile, Plan, SourceData, TensorData
from anyckpt.engine.shared_run import SharedRun
from anyckpt.errors import OutputError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_folder import latest
from anyckpt.operations.save import _in_memory
from anyckpt.operations.writer_process import Upkeep
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Stored


def plan_of(state: dict[str, Any], to: str = "dcp") -> Plan:
    """The plan of a save of live state, as ``anyckpt.save`` makes it."""
    plan = registry.by_name(to).plan
    assert plan is not None
    return plan(_in_memory(state), WriteOptions())


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    made = BackgroundWriter()
    yield made
    made.close(wait=10)


def done(writer: BackgroundWriter, number: int) -> Any:
    outcome = writer.outcome(number, wait=30)
    assert outcome is not None, "not done in 30 s"
    return outcome


def test_what_is_written_is_the_state_at_the_call(writer: BackgroundWriter, tmp_path: Path) -> None:
    state = {"w": np.zeros((300, 70), np.float32), "b": np.arange(9, dtype=np.int16)}
    state["tied"] = state["w"]
    state["column"] = state["w"][:, 3]
    numbers = []
    for step in range(4):
        state["w"][:] = step
        numbers.append(writer.submit(plan_of({"model": state, "step": step}), str(tmp_path / str(step))))
        state["w"][:] = -1
    for step, number in enumerate(numbers):
        outcome = done(writer, number)
        assert outcome.error is None and outcome.published and outcome.bytes_written > 0
        found = anyckpt.open(tmp_path / str(step))
        assert found.training.step == step
        assert all(np.all(np.asarray(found[f"model.{name}"]) == step) for name in ("w", "tied", "column"))
        assert np.array_equal(np.asarray(found["model.b"]), np.arange(9))
        assert anyckpt.verify(tmp_path / str(step))


def test_only_what_the_plan_reads_is_copied_and_once(tmp_path: Path, writer: BackgroundWriter) -> None:
    whole = np.arange(1 << 20, dtype=np.uint8)
    live = MemorySource(whole)
    tensors = [
        Stored(live, start, dtype("uint8"), (length,)) for start, length in ((1000, 500), (1200, 800), (9000, 4))
    ]
    plan = Plan(
        "sample",
        (
            OutputFile("a", tuple(TensorData("x", tensor) for tensor in tensors)),
            OutputFile("b", (SourceData(live.slice(20_000, 100)), SourceData(MemorySource(b"fixed")))),
        ),
    )
    assert Copies(plan, None).nbytes == 1024 + 64 + 128  # of 1000, 4 and 100 bytes
    outcome = done(writer, writer.submit(plan, str(tmp_path / "out")))
    assert outcome.error is None
    expected = whole[1000:1500].tobytes() + whole[1200:2000].tobytes() + whole[9000:9004].tobytes()
    assert (tmp_path / "out" / "a").read_bytes() == expected
    assert (tmp_path / "out" / "b").read_bytes() == whole[20_000:20_100].tobytes() + b"fixed"


def test_memory_is_used_again(writer: BackgroundWriter, tmp_path: Path) -> None:
    for step in range(5):
        done(writer, writer.submit(plan_of({"w": np.ones(5000 * (1 + step % 2))}), str(tmp_path / str(step))))
    held = [file for file in psutil.Process().memory_maps(grouped=False) if "memfd:anyckpt" in file.path]
    assert len(held) == 1


def test_it_has_neither_torch_nor_an_accelerator(writer: BackgroundWriter, tmp_path: Path) -> None:
    done(writer, writer.submit(plan_of({"w": np.ones(5)}), str(tmp_path / "out")))
    assert writer.pid is not None
    process = psutil.Process(writer.pid)
    assert process.environ()["CUDA_VISIBLE_DEVICES"] == ""
    assert not any("torch" in region.path for region in process.memory_maps())


def part(rank: int, owner: int, step: int, rows: int = 40) -> Stored:
    data = MemorySource(np.full(rows * 64, owner * 16 + step, np.uint8)) if rank == owner else None
    return Stored(OwnedSource(owner, (step, owner), rows * 64, data, f"w{owner}"), 0, dtype("uint8"), (rows, 64))


def shared_plan(rank: int, step: int) -> Plan:
    files = [OutputFile(f"{owner}", (TensorData(f"w{owner}", part(rank, owner, step)),)) for owner in (1, 2)]
    return Plan("sample", tuple(files))


def test_two_writers_of_one_plan_and_the_last_publishes(tmp_path: Path, writer: BackgroundWriter) -> None:
    second = BackgroundWriter()
    for step in range(1, 6):
        path = str(tmp_path / f"step-{step}")
        upkeep = Upkeep(Saved(f"step-{step}", step, 0.0), Retention(last=2))
        numbers = [
            one.submit(shared_plan(rank, step), path, share=Share(rank, 2), upkeep=upkeep)
            for rank, one in ((1, writer), (2, second))
        ]
        outcomes = [done(one, number) for one, number in zip((writer, second), numbers, strict=True)]
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert [outcome.published for outcome in outcomes].count(True) == 1
        for owner in (1, 2):
            assert set((tmp_path / f"step-{step}" / str(owner)).read_bytes()) == {owner * 16 + step}
    second.close()
    assert os.readlink(tmp_path / "latest") == "step-5"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["latest", "step-4", "step-5"]


def test_who_finds_it_published_has_not_published_it(tmp_path: Path) -> None:
    path = str(tmp_path / "step-1")
    runs = [SharedRun(shared_plan(rank, 1), path, 2) for rank in (1, 2)]
    for rank, run in enumerate(runs, 1):
        run.write(Share(rank, 2))
    assert [run.missing() for run in runs] == [{}, {}]  # both may publish it
    assert [run.finish().published for run in runs] == [True, False]


def test_what_nobody_published_is_published_when_that_is_seen(tmp_path: Path, writer: BackgroundWriter) -> None:
    """As where a host sees late what another one has written."""
    path = str(tmp_path / "step-1")
    upkeep = Upkeep(Saved("step-1", 1, 0.0), Retention())
    number = writer.submit(shared_plan(1, 1), path, share=Share(1, 2), key="k", upkeep=upkeep)
    assert not done(writer, number).published
    plan = shared_plan(2, 1)
    SharedRun(plan, path, 2).renewed(plan, path, "k").write(Share(2, 2))
    outcome = writer.finish(number)
    assert outcome.error is None and outcome.published
    assert os.readlink(tmp_path / "latest") == "step-1"
    assert done(writer, number) == outcome


def test_what_cannot_be_published_any_more(tmp_path: Path, writer: BackgroundWriter) -> None:
    path = str(tmp_path / "step-1")
    number = writer.submit(shared_plan(1, 1), path, share=Share(1, 2), key="k")
    assert not done(writer, number).published
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    assert "by SIGKILL" in str(writer.finish(number).error)
    assert "is written and not published" in str(writer.finish(number).error)


def test_what_is_discarded_before_the_end_is_gone(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    done(writer, writer.submit(shared_plan(1, 1), str(tmp_path / "step-1"), share=Share(1, 2), key="k"))
    assert (tmp_path / ".step-1.anyckpt-partial").exists()
    writer.discard(str(tmp_path / "step-1"))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_errors_come_back_with_their_cause(writer: BackgroundWriter, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    outcome = done(writer, writer.submit(plan_of({"w": np.ones(5)}), str(tmp_path / "there")))
    assert isinstance(outcome.error, OutputError) and "already exists" in str(outcome.error)
    (tmp_path / "file").write_text("x")
    outcome = done(writer, writer.submit(plan_of({"w": np.ones(5)}), str(tmp_path / "file" / "inside")))
    assert isinstance(outcome.error, OutputError) and "file" in str(outcome.error)
    outcome = done(writer, writer.submit(plan_of({"w": np.ones(5)}), str(tmp_path / "good")))
    assert outcome.error is None


def test_no_room_for_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        writer = BackgroundWriter()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    outcome = done(writer, writer.submit(plan_of({"w": np.ones(1 << 18)}), str(tmp_path / "large")))
    assert isinstance(outcome.error, OutputError) and "large" in str(outcome.error)
    outcome = done(writer, writer.submit(plan_of({"w": np.ones(1 << 8)}), str(tmp_path / "small")))
    assert outcome.error is None
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_writer_that_is_killed_is_replaced(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    numbers = [writer.submit(plan_of({"w": np.ones(1 << 22)}), str(tmp_path / str(step))) for step in range(3)]
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    outcomes = [done(writer, number) for number in numbers]
    assert "by SIGKILL" in str(outcomes[-1].error)
    for number in range(3):
        assert (tmp_path / str(number)).exists() or outcomes[number].error is not None
    assert done(writer, writer.submit(plan_of({"w": np.ones(3)}), str(tmp_path / "after"))).error is None
    writer.close()
    assert anyckpt.verify(tmp_path / "after")


def test_a_fork_does_not_use_it(writer: BackgroundWriter, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            writer.submit(plan_of({"w": np.ones(3)}), str(tmp_path / "out"))
        except UsageError:
            writer.close()
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert done(writer, writer.submit(plan_of({"w": np.ones(3)}), str(tmp_path / "out"))).error is None


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("with_child", [False, True])
def test_it_ends_with_its_trainer(with_child: bool, tmp_path: Path) -> None:
    """Also where a fork of the trainer, as of a data loader, lives on and holds the socket."""
    code = f"""
import os, sys, time
import numpy as np
from tests.operations.test_background_writer import plan_of
from anyckpt.operations.background_writer import BackgroundWriter
writer = BackgroundWriter()
child = os.fork() if {with_child} else -1
if child == 0:
    time.sleep(60)
    os._exit(0)
state = {{"w": np.ones(1 << 22)}}
for step in range(3):
    writer.submit(plan_of(state), {str(tmp_path)!r} + f"/step-{{step}}")
print(writer.pid, child, flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])}
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid, child = map(int, trainer.stdout.readline().split())
    writing = psutil.Process(pid)
    trainer.kill()
    trainer.wait()
    assert eventually(lambda: not writing.is_running() or writing.status() == psutil.STATUS_ZOMBIE)
    if child > 0:
        os.kill(child, signal.SIGKILL)
    for path in tmp_path.iterdir():
        assert path.name.startswith(".") or anyckpt.verify(path)
    newest = latest(tmp_path)
    assert newest is None or anyckpt.verify(newest)


def test_what_has_to_be_copied_is_found_once_for_plans_that_read_the_same(
    writer: BackgroundWriter, tmp_path: Path
) -> None:
    live = {name: np.zeros(300, np.uint8) for name in "ab"}
    parts = {name: SourceData(MemorySource(array)) for name, array in live.items()}
    kept: list[Copies] = []
    found = []
    for step, names in enumerate(("ab", "ab", "a")):
        for array in live.values():
            array[:] = step
        plan = Plan("sample", (OutputFile("f", (Literal(bytes([step])), *(parts[name] for name in names))),))
        done(writer, writer.submit(plan, str(tmp_path / str(step)), kept=kept))
        found.append(kept[0])
        wanted = bytes([step]) + bytes([step]) * 300 * len(names)
        assert (tmp_path / str(step) / "f").read_bytes() == wanted
    assert found[0] is found[1] is not found[2]
    assert (found[1].nbytes, found[2].nbytes) == (640, 320)
