"""The engine: the same bytes in any order, and the commit protocol under failure."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.sample import make_source, sample_plan, shrink_blocks
from tests.support import assert_whole

from anyckpt.dtypes import dtype
from anyckpt.engine import blocks, execute, outputs, run
from anyckpt.engine.blocks import Block, LatePart, cut
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.manifest import check_manifest, manifest_path, read_manifest
from anyckpt.engine.plan import Computed, Literal, OutputFile, Plan, SourceData, TensorData, small_file
from anyckpt.engine.staging import StagingDirectory
from anyckpt.engine.together import Gang, gangs
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.identity import ElementWise
from anyckpt.storage import LocalFile, MemorySource
from anyckpt.tensor import Constant, LazyTensor, Mapped, Stored, concatenate

SAMPLE = Path(__file__).with_name("sample.py")


@dataclass(frozen=True)
class AtMost(ElementWise):
    limit: float

    def __call__(self, values: Any) -> Any:
        return np.minimum(values, np.float32(self.limit))


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".anyckpt-partial")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunk=st.sampled_from([4096, 8192, 65536, 4 << 20]), workers=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_block_order_and_worker_count_give_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, workers: int, seed: int
) -> None:
    def shuffled(number: int, file: OutputFile, owner: Any) -> tuple[list[Block], list[LatePart]]:
        found, late = cut(number, file, owner)
        random.Random(seed).shuffle(found)
        return found, late

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "cut", shuffled)
        shrink_blocks(chunk)
        plan = sample_plan(source)
        output = tmp_path / f"out-{chunk}-{workers}-{seed}"
        if not output.exists():
            execute.execute(plan, str(output), workers=workers)
        assert_whole(plan, output)
        assert leftovers(tmp_path) == []


def test_a_single_file_has_its_manifest_beside_it(source: Path, tmp_path: Path) -> None:
    plan = sample_plan(source, directory=False)
    report = execute.execute(plan, str(tmp_path / "out.bin"), source_paths=[str(source)])
    assert_whole(plan, tmp_path / "out.bin")
    assert manifest_path(str(tmp_path / "out.bin")) == str(tmp_path / ".out.bin.anyckpt-manifest.json")
    assert report.bytes_written == plan.nbytes == (tmp_path / "out.bin").stat().st_size
    assert report.tensors == 4
    assert report.bytes_read > 0


def test_blocks_tile_every_file(source: Path) -> None:
    shrink_blocks(8192)
    for number, file in enumerate(sample_plan(source).files):
        found, late = cut(number, file)
        ranges = [(b.offset, b.offset + b.nbytes) for b in found]
        ranges += [(part.offset, part.offset + file.parts[part.part].nbytes) for part in late]
        ranges.sort()
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
        assert ranges[-1][1] == file.nbytes
        assert all(b.nbytes <= 8192 for b in found)


def test_an_existing_destination_is_replaced_only_on_request(source: Path, tmp_path: Path) -> None:
    for directory, output in ((True, tmp_path / "folder"), (False, tmp_path / "file")):
        plan = sample_plan(source, directory=directory)
        execute.execute(plan, str(output))
        before = output.stat().st_ino
        with pytest.raises(OutputError, match="already exists.*--overwrite"):
            execute.execute(plan, str(output))
        assert output.stat().st_ino == before
        execute.execute(plan, str(output), overwrite=True)
        assert output.stat().st_ino != before
        assert_whole(plan, output)
    assert leftovers(tmp_path) == []


def test_a_folder_can_be_replaced_by_a_file_and_back(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for directory in (True, False, True):
        plan = sample_plan(source, directory=directory)
        execute.execute(plan, str(output), overwrite=True)
        assert_whole(plan, output)


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    short = Stored(MemorySource(b"\0" * 100, name="cut.bin"), 0, dtype("float32"), (50,))
    plan = Plan("sample", (small_file("a", b"x" * 10, 0), OutputFile("b", (TensorData("w", short),))))
    with pytest.raises(FormatError, match="cut.bin: tensor 'w'"):
        execute.execute(plan, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_length_of_a_computed_part_is_refused(tmp_path: Path) -> None:
    parts = (Literal(b"abc"), Computed(4, (0,), lambda crcs: b"12345"))
    with pytest.raises(OutputError, match="another length"):
        execute.execute(Plan("sample", (OutputFile("", parts),)), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too little memory"):
        execute.execute(sample_plan(source), str(tmp_path / "out"), memory=1 << 20)


def test_two_processes_do_not_write_one_output(source: Path, tmp_path: Path) -> None:
    staging = StagingDirectory(str(tmp_path / "out"))
    staging.begin(sample_plan(source), "x", share=None, resume=False)
    with pytest.raises(OutputError, match="another process"):
        execute.execute(sample_plan(source), str(tmp_path / "out"))
    staging.discard()
    execute.execute(sample_plan(source), str(tmp_path / "out"))


def test_every_moment_of_death_leaves_nothing_or_something_to_resume(source: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; then --resume gives the bytes of an undisturbed run."""
    plan_source = make_source(tmp_path / "big.bin", 3 << 20)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SAMPLE.parents[2]), *sys.path])}
    command = [sys.executable, str(SAMPLE), str(plan_source), str(tmp_path / "out")]
    shrink_blocks(16384)
    plan = sample_plan(plan_source)
    generator = random.Random(11)
    killed = resumed = 0
    for _ in range(12):
        arguments = ["resume"] if generator.random() < 0.7 else []
        child = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, env=environment)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(generator.uniform(0, 0.25))
        child.send_signal(signal.SIGKILL)
        code = child.wait()
        child.stdout.close()
        if code == 0:
            assert_whole(plan, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
            continue
        killed += 1
        journal = tmp_path / ".out.anyckpt-partial" / "journal"
        resumed += journal.exists() and len(journal.read_text().splitlines()) > 1
        if (tmp_path / "out").exists():
            assert_whole(plan, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    finished = subprocess.run([*command, "resume"], env=environment, stdout=subprocess.PIPE, check=False)
    assert finished.returncode == 0
    assert_whole(plan, tmp_path / "out")
    assert leftovers(tmp_path) == []
    assert killed, "no run was killed in time; the sample is too small"
    assert resumed, "no killed run left durable blocks; the sample is too small"


class _FailingDisk:
    """``os.pwrite`` that fails after a number of calls."""

    def __init__(self, calls: int, code: int) -> None:
        self.left, self.code, self.real = calls, code, os.pwrite

    def __call__(self, *arguments: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 7, 40])
def test_a_disk_that_fills_up_can_be_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    shrink_blocks(8192, sync_every=20_000)
    plan = sample_plan(source)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _FailingDisk(calls, errno.ENOSPC))
        with pytest.raises(OutputError, match="no space left.*--resume"):
            execute.execute(plan, str(tmp_path / "out"), source_paths=[str(source)])
    assert not (tmp_path / "out").exists()
    report = execute.execute(plan, str(tmp_path / "out"), resume=True, source_paths=[str(source)])
    assert_whole(plan, tmp_path / "out")
    assert report.resumed_bytes > 0 or calls < 40
    assert leftovers(tmp_path) == []


def test_a_small_file_system_is_refused_before_writing(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OutputError, match="not enough space"):
            execute.execute(sample_plan(source), str(small / "out"))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_room_is_asked_for_before_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, on every machine: here the system's answer is made up."""
    plan, folder, real = sample_plan(source), tmp_path / "disk", os.statvfs
    folder.mkdir()

    def with_free(nbytes: int) -> Callable[[str], os.statvfs_result]:
        values = list(real(folder))
        values[1], values[4] = 1, nbytes  # f_frsize, f_bavail
        return lambda _: os.statvfs_result(values)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", with_free(plan.nbytes // 2))
        with pytest.raises(OutputError, match="not enough space"):
            execute.execute(plan, str(folder / "out"))
        assert list(folder.iterdir()) == []
        patch.setattr(os, "statvfs", with_free(plan.nbytes))
        execute.execute(plan, str(folder / "out"))


def test_work_of_another_plan_or_a_changed_source_is_not_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_blocks(8192)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _FailingDisk(40, errno.EIO))
        with pytest.raises(OutputError, match="cannot be written"):
            execute.execute(sample_plan(source), str(tmp_path / "out"), source_paths=[str(source)])
    os.utime(source, ns=(1, 1))
    with pytest.raises(OutputError, match="source has changed"):
        execute.execute(sample_plan(source), str(tmp_path / "out"), resume=True, source_paths=[str(source)])
    execute.execute(sample_plan(source), str(tmp_path / "out"), source_paths=[str(source)])
    assert_whole(sample_plan(source), tmp_path / "out")


def test_a_torn_journal_line_is_dropped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(8192)
    plan = sample_plan(source)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _FailingDisk(40, errno.ENOSPC))
        with pytest.raises(OutputError):
            execute.execute(plan, str(tmp_path / "out"), source_paths=[str(source)])
    journal = tmp_path / ".out.anyckpt-partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-30])
    execute.execute(plan, str(tmp_path / "out"), resume=True, source_paths=[str(source)])
    assert_whole(plan, tmp_path / "out")


def test_the_manifest_finds_a_flipped_bit_a_missing_file_and_a_climbing_name(source: Path, tmp_path: Path) -> None:
    execute.execute(sample_plan(source), str(tmp_path / "out"))
    path = tmp_path / "out" / "data" / "0.bin"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    (tmp_path / "out" / "data" / "1.bin").unlink()
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    problems = [problem for _, problem in check_manifest(str(tmp_path / "out"), manifest) if problem]
    assert any("0.bin: bytes differ" in problem for problem in problems)
    assert any("1.bin" in problem for problem in problems)
    manifest.files["../source.bin"] = 3
    assert any("outside" in problem for _, problem in check_manifest(str(tmp_path / "out"), manifest))
    (tmp_path / "out" / ".anyckpt-manifest.json").write_text('{"anyckpt_manifest": 1, "digest": 3}')
    with pytest.raises(FormatError, match="damaged manifest|another version"):
        read_manifest(str(tmp_path / "out"))


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    plan = Plan("sample", tuple(small_file(f"{n % 7}/{n}", b"%d" % n * 3, 0) for n in range(900)))
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 300, before[1]))
    try:
        execute.execute(plan, str(tmp_path / "out"), workers=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_whole(plan, tmp_path / "out")


@pytest.mark.parametrize("most", [1, 2])
def test_files_that_are_closed_and_opened_again_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Blocks of a few files in turn, with pages that they share, and fewer files open than are written."""
    shrink_blocks(4096, sync_every=50_000)
    monkeypatch.setattr(outputs, "_MOST_OPEN", most)
    plan = sample_plan(source)

    def mixed(files: Any, blocks: Any, most_together: int) -> Iterator[Gang]:
        found = list(gangs(files, blocks, most_together))
        random.Random(1).shuffle(found)
        return iter(found)

    monkeypatch.setattr(run, "gangs", mixed)
    execute.execute(plan, str(tmp_path / "out"), workers=3)
    assert_whole(plan, tmp_path / "out")


def test_a_plan_names_each_file_once() -> None:
    with pytest.raises(OutputError, match="twice"):
        Plan("sample", (small_file("a", b""), small_file("a", b"")))


def test_resuming_finished_work_finds_it_done(source: Path, tmp_path: Path) -> None:
    plan, output = sample_plan(source), tmp_path / "out"
    execute.execute(plan, str(output), source_paths=[str(source)])
    before = output.stat().st_ino
    report = execute.execute(plan, str(output), resume=True, source_paths=[str(source)])
    assert (report.resumed_bytes, output.stat().st_ino) == (plan.nbytes, before)
    assert leftovers(tmp_path) == []
    os.utime(source, ns=(1, 1))
    with pytest.raises(OutputError, match="already exists"):
        execute.execute(plan, str(output), resume=True, source_paths=[str(source)])


def test_other_bytes_of_the_same_shape_are_other_work(source: Path, tmp_path: Path) -> None:
    data = Stored(LocalFile(source), 0, dtype("float32"), (64, 16))

    def plan(tensor: LazyTensor) -> Plan:
        return Plan("sample", (OutputFile("", (TensorData("w", tensor),)),))

    def scaled(factor: float) -> LazyTensor:
        return Mapped((data,), dtype("float32"), AtMost(factor))

    half = data.narrow(0, 0, 32)
    variants = [
        data,
        Stored(LocalFile(source), 64, dtype("float32"), (64, 16)),
        data.permute((1, 0)).reshape((64, 16)),
        half.pad(0, 64),
        concatenate([half, Constant(dtype("float32"), (32, 16), b"\x00\x00\x80\x3f")], 0),
        concatenate([half, half], 0),
        scaled(2.0),
        scaled(3.0),
        data.cast("float16").cast("float32"),
    ]
    found = [fingerprint(plan(tensor), [str(source)]) for tensor in variants]
    assert len(set(found)) == len(variants)
    assert found[4] == fingerprint(
        plan(concatenate([half, Constant(dtype("float32"), (32, 16), b"\x00\x00\x80\x3f")], 0)), [str(source)]
    )
    assert found[7] == fingerprint(plan(scaled(3.0)), [str(source)])
    execute.execute(plan(scaled(2.0)), str(tmp_path / "out"), source_paths=[str(source)])
    with pytest.raises(OutputError, match="already exists"):
        execute.execute(plan(scaled(3.0)), str(tmp_path / "out"), resume=True, source_paths=[str(source)])
    (tmp_path / "out").write_bytes(b"cut short")
    with pytest.raises(OutputError, match="already exists"):
        execute.execute(plan(scaled(2.0)), str(tmp_path / "out"), resume=True, source_paths=[str(source)])


def test_a_change_in_any_file_that_is_read_is_other_work(source: Path, tmp_path: Path) -> None:
    """Also in one that lies beside the path that was opened, behind a view or a slice of it."""
    beside = tmp_path / "beside.bin"
    beside.write_bytes(bytes(4096))
    other = LocalFile(beside)
    parts = {
        "tensor": TensorData("w", Stored(other, 0, dtype("float32"), (64, 16)).narrow(1, 2, 4).cast("float16")),
        "joined": TensorData(
            "w", concatenate([Stored(LocalFile(path), 0, dtype("uint8"), (8,)) for path in (source, beside)], 0)
        ),
        "slice": SourceData(other.slice(16, 32)),
    }
    for part in parts.values():
        plan = Plan("sample", (OutputFile("", (part,)),))
        os.utime(beside, ns=(1, 1))
        before = fingerprint(plan, [str(source)])
        assert fingerprint(plan, [str(source)]) == before
        os.utime(beside, ns=(2, 2))
        assert fingerprint(plan, [str(source)]) != before


def test_cutting_a_file_looks_at_each_part_as_often_however_many_there_are() -> None:
    looks = 0

    class Counted(Literal):
        @property
        def nbytes(self) -> int:
            nonlocal looks
            looks += 1
            return 16

    def cost(count: int) -> int:
        nonlocal looks
        looks = 0
        parts: list[Any] = []
        for number in range(count):
            parts += [Counted(bytes(16)), Computed(4, (2 * number,), lambda checksums: bytes(4))]
        found, late = cut(0, OutputFile("f", tuple(parts)))
        assert sum(block.nbytes for block in found) == 20 * count
        assert late == []
        return looks

    assert cost(2000) <= 2.2 * cost(1000)


def test_what_is_read_is_counted_for_whoever_reads_it(source: Path, tmp_path: Path) -> None:
    """Two runs at once in one process."""
    plan = sample_plan(source, directory=True)
    alone = execute.execute(plan, str(tmp_path / "alone")).bytes_read
    begun = threading.Barrier(2)
    found: dict[str, int] = {}

    def run(name: str) -> None:
        def progress(done: int, total: int) -> None:
            if name not in found:
                found[name] = 0
                begun.wait(timeout=60)

        found[name] = execute.execute(plan, str(tmp_path / name), progress=progress, workers=2).bytes_read

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"one": alone, "other": alone}


@pytest.mark.parametrize("change", ["bytes", "file", "nothing there"])
def test_a_source_that_changes_meanwhile(source: Path, change: str, tmp_path: Path) -> None:
    """What was written then is of neither state, though every read succeeded."""
    plan = sample_plan(source, directory=True)
    touched: list[int] = []

    def progress(done: int, total: int) -> None:
        if done == total and not touched:
            touched.append(done)
            data = source.read_bytes()
            if change == "bytes":
                source.write_bytes(data[::-1])
            else:
                source.unlink()
            if change == "file":
                source.write_bytes(data)

    with pytest.raises(FormatError, match="cannot be found any more" if change == "nothing there" else "changed while"):
        execute.execute(plan, str(tmp_path / "out"), progress=progress)
    assert touched and not (tmp_path / "out").exists() and leftovers(tmp_path) == []
