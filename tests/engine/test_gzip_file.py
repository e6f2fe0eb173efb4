"""A file that is compressed while it is written: members, digest, what is refused, and what a failure leaves."""

from __future__ import annotations

import errno
import gzip
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.sample import make_source, sample_plan

from anyckpt.engine import gzip_file
from anyckpt.engine.checksum import RunningDigest, digest_of
from anyckpt.engine.destination import Share
from anyckpt.engine.execute import execute
from anyckpt.engine.gzip_file import GzipFile
from anyckpt.engine.manifest import check_manifest, read_manifest
from anyckpt.engine.plan import Computed, Literal, OutputFile, Plan, SourceData
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.storage import MemorySource
from anyckpt.storage.inflate import GZIP, InflatedSource
from anyckpt.storage.source import ByteSource


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return sample_plan(make_source(tmp_path / "source", 3_000_000), directory=False)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("run", [10_000, 4 << 20])
def test_members_hold_the_plan(
    plan: Plan, threads: int, run: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_file, "RUN_BYTES", run)
    execute(plan, str(tmp_path / "plain"))
    report = execute(plan, GzipFile(str(tmp_path / "out"), threads=threads), workers=threads)
    data, plain = (tmp_path / "out").read_bytes(), (tmp_path / "plain").read_bytes()
    assert gzip.decompress(data) == plain
    assert InflatedSource(MemorySource(data), None, GZIP).read_all() == plain
    assert report.bytes_written == len(data)
    assert report.output == str(tmp_path / "out")
    stream = io.BytesIO(data)
    with gzip.GzipFile(fileobj=stream) as file:
        file.read(1)
        assert file.mtime == 0
    assert data[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # no name, no time, no system
    execute(plan, GzipFile(str(tmp_path / "again"), threads=3))
    assert (tmp_path / "again").read_bytes() == data


def test_its_manifest_answers_for_every_byte(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "out"
    execute(plan, GzipFile(str(path)))
    manifest = read_manifest(str(path))
    assert manifest is not None
    assert manifest.files == {"": path.stat().st_size}
    assert [problem for _, problem in check_manifest(str(path), manifest)] == [""]
    assert GzipFile(str(path)).is_published(manifest.plan)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "bytes differ" in next(problem for _, problem in check_manifest(str(path), manifest))
    path.write_bytes(data[:-1])
    assert not GzipFile(str(path)).is_published(manifest.plan)


class _FailingSource(ByteSource):
    """Its first half can be read."""

    name = "half"
    path = None

    def __init__(self) -> None:
        self.size = 40 << 20

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        if offset > self.size // 2:
            raise FormatError("is damaged", path=self.name)
        buffer[:] = bytes(len(buffer))


@pytest.mark.parametrize("kind", ["source", "disk", "interrupt"])
def test_a_failure_leaves_nothing(kind: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").write_bytes(b"before")
    destination = GzipFile(str(folder / "out"), overwrite=True, threads=2)
    expected: type[BaseException] = {"source": FormatError, "disk": OutputError}.get(kind, KeyboardInterrupt)
    if kind == "source":
        plan = Plan("sample", (OutputFile("", (SourceData(_FailingSource()),)),))
    elif kind == "disk":
        fsync = os.fsync

        def refuse(descriptor: int) -> None:
            if os.fstat(descriptor).st_size > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
    before = threading.active_count()
    with pytest.raises(expected) as caught:
        execute(plan, destination, progress=_interrupt if kind == "interrupt" else None)
    if kind == "disk":
        assert "no space left" in str(caught.value)
        assert "--resume" not in str(caught.value)
    assert os.listdir(folder) == ["out"]
    assert (folder / "out").read_bytes() == b"before"
    assert threading.active_count() == before


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_only_what_can_be_written_in_order_by_one_process(plan: Plan, tmp_path: Path) -> None:
    destination = GzipFile(str(tmp_path / "out"))
    with pytest.raises(UsageError, match="leave out --share and --resume"):
        destination.begin(plan, "f", share=Share(1, 2), resume=False)
    with pytest.raises(UsageError, match="leave out --share and --resume"):
        execute(plan, destination, resume=True)
    with pytest.raises(UsageError, match="only a single file"):
        execute(sample_plan(tmp_path / "source"), destination)
    early = Plan("sample", (OutputFile("", (Computed(4, (1,), lambda crcs: b"1234"), Literal(b"after"))),))
    with pytest.raises(UsageError, match="checksums of what follows"):
        execute(early, destination)
    assert os.listdir(tmp_path) == ["source"]


def test_fast_reading_waits_for_slow_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be compressed is a run for each thread, however much there is."""
    waiting: list[int] = []
    destination = GzipFile(str(tmp_path / "out"), threads=2)
    compress = gzip_file.isal_zlib.compress

    def slowly(*arguments: Any) -> bytes:
        waiting.append(len(destination._due))
        time.sleep(0.02)
        return bytes(compress(*arguments))

    monkeypatch.setattr(gzip_file.isal_zlib, "compress", slowly)
    monkeypatch.setattr(gzip_file, "RUN_BYTES", 50_000)
    data = np.random.default_rng(1).integers(0, 9, 2_000_000, dtype=np.uint8).tobytes()
    execute(Plan("sample", (OutputFile("", (SourceData(MemorySource(data)),)),)), destination)
    assert len(waiting) == 40
    assert max(waiting) <= 3
    assert gzip.decompress((tmp_path / "out").read_bytes()) == data


def test_a_killed_process_leaves_what_the_next_one_clears(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "run.py").write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.engine.sample import sample_plan\n"
        "from anyckpt.engine.execute import execute\n"
        "from anyckpt.engine.gzip_file import GzipFile\n"
        "GzipFile.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "execute(sample_plan(Path(sys.argv[1]), directory=False), GzipFile(sys.argv[2]))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    program = [sys.executable, tmp_path / "run.py", tmp_path / "source", folder / "out"]
    assert subprocess.run(program, env=environment, check=False).returncode < 0
    assert os.listdir(folder) == [".out.anyckpt-partial"]
    execute(plan, GzipFile(str(folder / "out")))
    assert sorted(os.listdir(folder)) == [".out.anyckpt-manifest.json", "out"]


@given(st.lists(st.integers(0, 9 << 20), max_size=4))
def test_a_digest_grows_as_it_is_of_the_whole(lengths: list[int]) -> None:
    data = np.random.default_rng(7).integers(0, 256, sum(lengths), dtype=np.uint8).tobytes()
    digest, start = RunningDigest(), 0
    for length in lengths:
        digest.add(data[start : start + length])
        start += length
    assert digest.value() == digest_of(lambda offset, length: data[offset : offset + length], len(data))
