"""One process waits for the others: for how long, whom it misses, and when there is nobody to wait for."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.engine.sample import make_source, run_share, sample_plan, shrink_blocks

import anyckpt
from anyckpt.engine import blocks, checksum, files, run, shared_run
from anyckpt.engine.destination import Share
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import Trouble
from anyckpt.engine.shared_run import SharedRun
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import OutputError


@pytest.fixture(autouse=True)
def small_blocks_and_quick_beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = (blocks.CHUNK_BYTES, run._SYNC_EVERY, files._DIRECT_MINIMUM)
    shrink_blocks(8192)
    monkeypatch.setattr(shared_run, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(shared_run, "_POLL_SECONDS", 0.02)
    yield
    for module in (blocks, checksum, files):
        module.CHUNK_BYTES = before[0]
    run._SYNC_EVERY, files._DIRECT_MINIMUM = before[1:]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return sample_plan(make_source(tmp_path / "source.bin", 128 * 1024))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def journal(output: Path, number: int, of: int) -> Path:
    return output.parent / f".{output.name}.anyckpt-partial" / f"journal.{number}-of-{of}"


def begun(plan: Plan, output: Path, share: Share) -> StagingDirectory:
    """A process that has begun its share and is seen to."""
    place = StagingDirectory(str(output))
    place.begin(plan, SharedRun(plan, str(output), share.of)._identity.value, share=share, resume=True)
    return place


def failing(call: Callable[[], object]) -> tuple[str, float]:
    started = time.monotonic()
    with pytest.raises(OutputError) as error:
        call()
    return str(error.value), time.monotonic() - started


def test_the_first_share_publishes_when_the_others_have_come(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 3)
    work.write(Share(1, 3))
    later = [threading.Timer(0.3 * number, run_share, (plan, str(output), Share(number, 3))) for number in (2, 3)]
    for timer in later:
        timer.start()
    assert work.finish(wait=30).published
    assert output.exists()


def test_a_process_that_never_comes_is_named(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 3)
    work.write(Share(1, 3))
    run_share(plan, str(output), Share(3, 3))
    told, seconds = failing(lambda: work.finish(wait=0.5))
    assert "missing: share 2 of 3 (not begun in " in told and "share 3" not in told
    assert "run the processes of these shares again" in told and "do not see the same place" in told
    assert 0.5 <= seconds < 5


def test_signs_of_work_prolong_the_wait_and_silence_ends_it(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 2)
    work.write(Share(1, 2))
    other = begun(plan, output, Share(2, 2))
    stop = threading.Event()

    def beat() -> None:
        for _ in range(12):
            if not stop.wait(0.1):
                other.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    told, seconds = failing(lambda: work.finish(wait=0.6))
    assert "do not see" not in told
    stop.set()
    thread.join()
    assert "share 2 of 2 (silent for " in told
    assert 1.5 < seconds < 10
    other.close()


def test_beats_come_while_a_share_is_written(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = run.Run.write

    def slowly(self: run.Run, blocks: object) -> None:
        time.sleep(0.5)
        write(self, blocks)  # type: ignore[arg-type]

    monkeypatch.setattr(run.Run, "write", slowly)
    run_share(plan, str(output), Share(1, 2))
    beats = [line for line in journal(output, 1, 2).read_text().splitlines() if json.loads(line) == {}]
    assert len(beats) >= 2


def test_a_process_that_died_is_named_soon_however_long_the_wait(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 2)
    work.write(Share(1, 2))
    begun(plan, output, Share(2, 2)).close()  # as the system closes what a killed process has open
    told, seconds = failing(lambda: work.finish(wait=600))
    assert f"share 2 of 2 (process {os.getpid()} on " in told and " stopped; " in told
    assert seconds < 10
    run_share(plan, str(output), Share(2, 2))
    assert work.finish().published


def test_a_process_that_gave_up_says_why_and_the_others_are_not_hurt(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 3)
    work.write(Share(1, 3))
    begun(plan, output, Share(2, 3)).close(failure="the disk is full")
    other = begun(plan, output, Share(3, 3))
    failed: list[str] = []
    waiting = threading.Thread(target=lambda: failed.append(failing(lambda: work.finish(wait=600))[0]))
    waiting.start()
    for _ in range(8):
        other.beat()
        time.sleep(0.1)
    assert waiting.is_alive(), "the third is still at work"
    other.close()
    run_share(plan, str(output), Share(3, 3))
    waiting.join(20)
    assert "share 2 of 3 (process " in failed[0] and "gave up: the disk is full" in failed[0]
    assert "share 3" not in failed[0]


def test_a_process_whose_lock_cannot_be_seen_is_not_taken_for_dead(
    plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = SharedRun(plan, str(output), 2)
    work.write(Share(1, 2))
    other = begun(plan, output, Share(2, 2))
    unseen = {Share(2, 2): Trouble("stopped")}  # a file system without locks
    monkeypatch.setattr(StagingDirectory, "troubles", lambda self: unseen)
    beating = [threading.Timer(0.1 * number, other.beat) for number in range(15)]
    for timer in beating:
        timer.start()
    _, seconds = failing(lambda: work.finish(wait=600))
    assert seconds > 1.4
    other.close()


def test_no_clock_but_ones_own_is_looked_at(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = SharedRun(plan, str(output), 2)
    work.write(Share(1, 2))
    run_share(plan, str(output), Share(2, 2))
    for path in output.parent.joinpath(f".{output.name}.anyckpt-partial").iterdir():
        os.utime(path, (2**32, 2**32))
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert work.finish(wait=5).published


def test_processes_of_another_version_are_told(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_share(plan, str(output), Share(1, 2))
    monkeypatch.setattr(anyckpt, "__version__", "9.9")
    told, _ = failing(lambda: run_share(plan, str(output), Share(2, 2)))
    assert "another version of anyckpt (expected anyckpt 9.9, as here, found anyckpt " in told
    assert "give all processes the same version" in told
    assert not journal(output, 2, 2).exists()


def test_another_version_is_told_before_its_other_plan(
    plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_share(plan, str(output), Share(1, 2))
    monkeypatch.setattr(anyckpt, "__version__", "9.9")
    other = Plan("sample", plan.files[:-1])
    told, _ = failing(lambda: run_share(other, str(output), Share(2, 2)))
    assert "another version of anyckpt" in told and "share 1 of 2, process " in told


def test_the_process_of_another_plan_is_named(plan: Plan, output: Path) -> None:
    run_share(plan, str(output), Share(1, 2))
    told, _ = failing(lambda: run_share(Plan("sample", plan.files[:-1]), str(output), Share(2, 2)))
    assert re.search(
        r"found plan [0-9a-f]{12} of share 1 of 2, process \d+ on \S+\); give all processes the same", told
    )


def test_who_waits_while_another_publishes_finds_it_done(plan: Plan, output: Path) -> None:
    work = SharedRun(plan, str(output), 2)
    work.write(Share(1, 2))
    run_share(plan, str(output), Share(2, 2))
    publisher = StagingDirectory(str(output))
    publisher.begin(plan, work._identity.value, share=None, resume=True)
    threading.Timer(0.4, publisher.close).start()
    assert work.finish(wait=20).published
