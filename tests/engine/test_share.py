"""Several processes carry out one plan: the same bytes as one, whoever dies and starts anew."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.memory_destination import MemoryDestination, ObjectStore
from tests.engine.sample import make_source, run_share, sample_plan, shrink_blocks
from tests.support import assert_whole, file_bytes

from anyckpt.dtypes import dtype
from anyckpt.engine import blocks, run
from anyckpt.engine.blocks import cut_all
from anyckpt.engine.destination import BusyError, Share
from anyckpt.engine.execute import execute
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import Literal, OutputFile, Plan, TensorData
from anyckpt.engine.share import Division, divided
from anyckpt.engine.shared_run import SharedRun, finish
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.storage import LocalFile, MemorySource
from anyckpt.tensor import Stored, from_array

SAMPLE = Path(__file__).with_name("sample.py")


def assert_published(plan: Plan, output: Path) -> None:
    assert_whole(plan, output)
    assert [name for name in os.listdir(output.parent) if name.endswith(".anyckpt-partial")] == []


def child(source: Path, output: Path, *share: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SAMPLE.parents[2]), *sys.path])}
    command = [sys.executable, str(SAMPLE), str(source), str(output), *share]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_one_after_another_give_the_bytes_of_one_process(
    source: Path, tmp_path: Path, of: int, directory: bool
) -> None:
    shrink_blocks(8192)
    plan = sample_plan(source, directory=directory)
    output = tmp_path / "out"
    numbers = list(range(1, of + 1))
    random.Random(of).shuffle(numbers)
    for number in numbers:
        assert not output.exists()
        with pytest.raises(OutputError, match=f"missing: .*share {number} of {of}"):
            finish(plan, str(output), of, source_paths=[str(source)])
        report = run_share(plan, str(output), Share(number, of), workers=2, source_paths=[str(source)])
        assert report.resumed_bytes == 0
    done = finish(plan, str(output), of, source_paths=[str(source)])
    assert done.bytes_written == plan.nbytes
    assert_published(plan, output)
    again = run_share(plan, str(output), Share(1, of), source_paths=[str(source)])
    assert again.resumed_bytes == again.bytes_written
    finish(plan, str(output), of, source_paths=[str(source)])
    assert_published(plan, output)


@pytest.mark.parametrize("of", [2, 4])
def test_processes_at_once_of_which_some_are_killed_and_started_anew(tmp_path: Path, of: int) -> None:
    plan_source = make_source(tmp_path / "big.bin", 3 << 20)
    shrink_blocks(16384)
    plan = sample_plan(plan_source)
    output = tmp_path / "out"
    generator = random.Random(of)
    killed = 0
    for attempt in range(3):
        dying = generator.randrange(1, of + 1) if attempt < 2 else 0
        deaths = {dying: (str(generator.randrange(60)),)}
        found = [child(plan_source, output, f"{number}/{of}", *deaths.get(number, ())) for number in range(1, of + 1)]
        for process in found:
            _, error = process.communicate()
            killed += process.returncode == -signal.SIGKILL
            assert process.returncode in (0, -signal.SIGKILL), error
    finish(plan, str(output), of, source_paths=[str(plan_source)])
    assert_published(plan, output)
    assert killed


@pytest.mark.parametrize("of", [2, 3, 8])
def test_pages_in_which_two_shares_meet(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int) -> None:
    """A page is written whole past the page cache; each process would put back what the page was when it took it."""
    shrink_blocks(8192)
    plan, output, paths = sample_plan(source, directory=False), str(tmp_path / "out"), [str(source)]
    real, nested = run.Run.sync, iter(range(2, of + 1))

    def sync_after_the_next_share(self: run.Run) -> None:
        number = next(nested, None)
        if number is not None:
            run_share(plan, output, Share(number, of), workers=1, source_paths=paths)
        real(self)

    monkeypatch.setattr(run.Run, "sync", sync_after_the_next_share)
    run_share(plan, output, Share(1, of), workers=1, source_paths=paths)
    monkeypatch.setattr(run.Run, "sync", real)
    finish(plan, output, of, source_paths=paths)
    assert_published(plan, tmp_path / "out")


def test_one_process_goes_on_with_what_shares_left_and_shares_with_what_it_left(source: Path, tmp_path: Path) -> None:
    shrink_blocks(8192)
    plan = sample_plan(source)
    output, paths = str(tmp_path / "out"), [str(source)]
    run_share(plan, output, Share(2, 3), source_paths=paths)
    run_share(plan, output, Share(1, 5), source_paths=paths)
    report = execute(plan, output, resume=True, source_paths=paths)
    assert report.resumed_bytes
    assert_published(plan, tmp_path / "out")
    shutil.rmtree(output)
    run_share(plan, output, Share(1, 2), source_paths=paths)
    execute(plan, output, source_paths=paths)  # anew
    assert_published(plan, tmp_path / "out")


def test_ranks_of_different_plans_or_divisions_are_told(source: Path, tmp_path: Path) -> None:
    shrink_blocks(8192)
    plan, output, paths = sample_plan(source), str(tmp_path / "out"), [str(source)]
    run_share(plan, output, Share(1, 2), source_paths=paths)
    other = Plan("sample", plan.files[:-1])
    with pytest.raises(OutputError, match="of another conversion.*expected plan .*found plan .*same sources"):
        run_share(other, output, Share(2, 2), source_paths=paths)
    with pytest.raises(OutputError, match="of another conversion"):
        finish(other, output, 1, source_paths=paths, wait=0.1)
    at_work = StagingDirectory(output)
    at_work.begin(plan, read_fingerprint(tmp_path), share=Share(2, 2), resume=True)
    with pytest.raises(OutputError, match="each does 1/2 of the work"):
        run_share(plan, output, Share(2, 3), source_paths=paths)
    with pytest.raises(OutputError, match="this share is being written by another process"):
        run_share(plan, output, Share(2, 2), source_paths=paths)
    with pytest.raises(OutputError, match="is being written by another process"):
        execute(plan, output, resume=True, source_paths=paths)
    with pytest.raises(OutputError, match=r"share 2 of 2 \(still at work"):
        finish(plan, output, 2, source_paths=paths)
    at_work.close()
    with pytest.raises(OutputError, match=r"share 2 of 2 \(process [0-9]+ on .* stopped; "):
        finish(plan, output, 2, source_paths=paths)
    run_share(plan, output, Share(2, 2), source_paths=paths)
    finish(plan, output, 2, source_paths=paths)
    assert_published(plan, tmp_path / "out")


def read_fingerprint(folder: Path) -> str:
    journal = next((folder / ".out.anyckpt-partial").glob("journal*"))
    return journal.read_text().split('"fingerprint":"')[1].partition('"')[0]


def test_a_share_that_fails_says_why_to_who_finishes(tmp_path: Path) -> None:
    data = tmp_path / "cut.bin"
    data.write_bytes(bytes(100))
    short = Stored(LocalFile(data), 0, dtype("float32"), (50,))
    plan = Plan("sample", (OutputFile("a", (Literal(b"x" * 200),)), OutputFile("b", (TensorData("w", short),))))
    run_share(plan, str(tmp_path / "out"), Share(1, 2))
    with pytest.raises(FormatError, match="cut.bin"):
        run_share(plan, str(tmp_path / "out"), Share(2, 2))
    with pytest.raises(OutputError, match=r"share 2 of 2 \(.*cut.bin: tensor 'w'"):
        finish(plan, str(tmp_path / "out"), 2)
    data.write_bytes(bytes(200))


def test_live_state_is_not_divided(tmp_path: Path) -> None:
    import numpy as np

    live = from_array(np.zeros(5000, np.float32))
    plan = Plan("sample", (OutputFile("b", (TensorData("w", live),)),))
    with pytest.raises(UsageError, match="cannot be divided.*MemorySource"):
        run_share(plan, str(tmp_path / "out"), Share(1, 2))
    with pytest.raises(UsageError, match="no such share.*1/N to N/N.*3/2"):
        Share(3, 2)


@given(weights=st.lists(st.integers(0, 1000), max_size=200), of=st.integers(1, 70))
@settings(deadline=None)
def test_shares_weigh_the_same_up_to_one_thing(weights: list[int], of: int) -> None:
    shares = divided(weights, of)
    assert shares == sorted(shares) and all(1 <= share <= of for share in shares)
    loads = [sum(w for w, s in zip(weights, shares, strict=True) if s == number) for number in range(1, of + 1)]
    assert sum(loads) == sum(weights)
    assert max(loads) <= sum(weights) / of + max(weights, default=0)


def test_a_model_of_many_blocks_is_divided_within_two_percent() -> None:
    data = MemorySource(b"")
    shards = [
        OutputFile(f"{n}.bin", tuple(TensorData(f"w{n}.{i}", Stored(data, 0, dtype("uint8"), (i % 7 * 5_000_000,)))
                                     for i in range(40)))
        for n in range(60)
    ]  # fmt: skip
    plan = Plan("sample", tuple(shards))
    division = Division(plan, cut_all(plan.files), 64, StagingDirectory("/nowhere/x"))
    sizes = [sum(block.nbytes for block in division.blocks(Share(number, 64))) for number in range(1, 65)]
    assert sum(sizes) == plan.nbytes
    assert max(sizes) - min(sizes) < 0.1 * plan.nbytes / 64


@pytest.mark.parametrize("whole", [True, False])
def test_a_share_that_is_written_comes_while_another_process_publishes(
    source: Path, tmp_path: Path, whole: bool
) -> None:
    shrink_blocks(8192)
    plan, output = sample_plan(source), tmp_path / "out"
    for number in (1, 2) if whole else (1,):
        run_share(plan, str(output), Share(number, 2), source_paths=[str(source)])
    publishing = StagingDirectory(str(output))
    publishing.begin(plan, fingerprint(plan, [str(source)]).value, share=None, resume=True)
    if whole:
        report = run_share(plan, str(output), Share(2, 2), source_paths=[str(source)])
        assert (report.bytes_read, report.resumed_bytes) == (0, report.bytes_written)
    else:
        with pytest.raises(BusyError, match="being written by another process"):
            run_share(plan, str(output), Share(2, 2), source_paths=[str(source)])
    publishing.close()
    run_share(plan, str(output), Share(2, 2), source_paths=[str(source)])
    finish(plan, str(output), 2, source_paths=[str(source)])
    assert_published(plan, output)


# -- a destination of another kind ----------------------------------------------------------------------------


def test_who_looks_what_is_missing_while_another_process_publishes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, output = sample_plan(source), str(tmp_path / "out")
    late = SharedRun(plan, output, 1)
    run_share(plan, output, Share(1, 1))
    real = os.listdir

    def listdir(path: str) -> list[str]:
        monkeypatch.setattr(os, "listdir", real)
        finish(plan, output, 1)  # and the directory that is about to be listed is gone
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert late.missing() == {}
    assert_published(plan, tmp_path / "out")


@pytest.mark.parametrize("of", [1, 2, 4])
def test_an_object_store_takes_files_in_order_and_the_marker_last(source: Path, of: int) -> None:
    shrink_blocks(8192)
    plan, store = sample_plan(source), ObjectStore()
    for number in range(1, of + 1):
        run_share(plan, MemoryDestination(store, "m"), Share(number, of), workers=3)
        assert "latest" not in store.objects
    finish(plan, MemoryDestination(store, "m"), of)
    assert {name: store.objects[name] for name in store.objects if name != "manifest"} == {
        file.path: file_bytes(file) for file in plan.files
    }
    stages = {file.path: file.stage for file in plan.files}
    assert [stages[name] for name in store.sealed] == sorted(stages.values())
    with pytest.raises(OutputError, match="already exists"):
        execute(sample_plan(source, directory=False), MemoryDestination(store, "m"))


@pytest.mark.parametrize("seed", range(12))
def test_an_object_store_that_fails_is_gone_on_with(source: Path, seed: int) -> None:
    shrink_blocks(8192, sync_every=30_000)
    plan, store = sample_plan(source), ObjectStore()
    generator = random.Random(seed)
    of = generator.choice([1, 2, 3])
    failures = 0
    for _ in range(6):
        for number in range(1, of + 1):
            store.fail_after = generator.randrange(1, 60)
            try:
                run_share(plan, MemoryDestination(store, "m"), Share(number, of), workers=2)
            except OutputError:
                failures += 1
    store.fail_after = None
    resumed = 0
    for number in range(1, of + 1):
        resumed += run_share(plan, MemoryDestination(store, "m"), Share(number, of)).resumed_bytes
    finish(plan, MemoryDestination(store, "m"), of)
    assert failures and resumed
    assert all(store.objects[file.path] == file_bytes(file) for file in plan.files)


def test_a_block_takes_little_memory() -> None:
    """A model of a trillion parameters has half a million of them."""
    (block,), _ = blocks.cut(0, OutputFile("", (Literal(b"a"),)))
    taken = sys.getsizeof(block) + sys.getsizeof(block.pieces) + sys.getsizeof(block.pieces[0])
    assert not hasattr(block, "__dict__") and not hasattr(block.pieces[0], "__dict__") and taken < 250
