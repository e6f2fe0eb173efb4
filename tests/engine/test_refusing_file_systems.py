"""File systems that refuse what others do: the output is the same, and what is not promised there is said."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.runner import Runner
from tests.places import files_below
from tests.support import fixture_path

from anyckpt.engine import living, publishing, shortfalls
from anyckpt.engine.staging import StagingDirectory
from anyckpt.operations.clean import clean

REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
SOURCE = "families/qwen3/hf"


def refusing(code: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


class NoRenameat2:
    """A C library, or a kernel, without it: what it answers on NFS and FUSE."""

    def __init__(self, name: object, use_errno: bool = False) -> None:
        pass

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


def told(run: Runner, *words: str | Path) -> tuple[str, ...]:
    """The notes on the file system, which the text says as the JSON does."""
    result = run("convert", fixture_path(SOURCE), *words, "--json")
    assert result.code == 0, result.err
    known = {shortfalls.NO_LOCKS, shortfalls.NOT_DURABLE, shortfalls.MAY_REPLACE, shortfalls.TWO_STEPS}
    return tuple(note for note in result.json["notes"] if note in known)


@pytest.mark.parametrize("code", REFUSALS)
def test_nothing_that_is_refused_changes_the_output(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner(capsys)
    assert told(run, tmp_path / "right", "--to", "megatron-core") == ()
    assert told(run, tmp_path / "right.pt", "--to", "torch") == ()
    real = os.open
    monkeypatch.setattr(os, "fsync", refusing(code))
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    monkeypatch.setattr(publishing.ctypes, "CDLL", NoRenameat2)
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(
        os, "open", lambda path, flags, *more, **named: real(path, flags & ~os.O_DIRECT, *more, **named)
    )
    assert told(run, tmp_path / "out", "--to", "megatron-core") == (shortfalls.NO_LOCKS, shortfalls.NOT_DURABLE)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "right")
    again = told(run, tmp_path / "out", "--to", "megatron-core", "--overwrite")
    assert again == (shortfalls.NO_LOCKS, shortfalls.NOT_DURABLE, shortfalls.TWO_STEPS)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "right")
    file = told(run, tmp_path / "out.pt", "--to", "torch")
    assert file == (shortfalls.NO_LOCKS, shortfalls.NOT_DURABLE, shortfalls.MAY_REPLACE)
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "right.pt").read_bytes()
    text = run("convert", fixture_path(SOURCE), tmp_path / "text", "--to", "hf").err
    assert f"note: {shortfalls.NO_LOCKS}" in text
    assert not list(tmp_path.glob(".*partial"))


def test_direct_writes_that_are_refused_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is taken, and what it is for is not, as by some of FUSE and where larger blocks are asked for."""
    from anyckpt.engine.files import BlockBuffer, BlockFile

    real, flags = os.pwrite, {}

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            flags[descriptor] = True
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    data = os.urandom((1 << 20) + 12345)
    file, buffer = BlockFile(str(tmp_path / "file"), len(data)), BlockBuffer()
    for start in range(0, len(data), 100_000):
        part = data[start : start + 100_000]
        memory = buffer.at(start, len(part))
        memory.data[:] = part
        file.write(start, memory)
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == data


def test_a_name_that_is_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the system's call, too, no file is replaced that was not there before."""
    (tmp_path / "new").write_bytes(b"new")
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(publishing.ctypes, "CDLL", NoRenameat2)
        (tmp_path / "there").write_bytes(b"of another")
        with pytest.raises(FileExistsError):
            publishing.put_new(str(tmp_path / "new"), str(tmp_path / "there"))
        assert (tmp_path / "there").read_bytes() == b"of another"
        (tmp_path / "there").unlink()
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    (tmp_path / "there").write_bytes(b"of another")
    with pytest.raises(FileExistsError):  # it appears after the look: linking notices
        publishing.put_new(str(tmp_path / "new"), str(tmp_path / "there"))
    assert (tmp_path / "there").read_bytes() == b"of another"


def test_without_locks_a_living_process_of_this_machine_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    staging = Path(StagingDirectory(str(tmp_path / "out")).directory)
    staging.mkdir()
    run, words = Runner(capsys), ("convert", fixture_path(SOURCE), tmp_path / "out", "--to", "hf")
    code = "import json; from anyckpt.engine import living; print(json.dumps(living.this_process()), flush=True)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    (staging / "lock").write_text(other.stdout.readline())
    assert "is being written by another process" in run(*words).error
    assert clean(tmp_path).busy and staging.exists()
    other.communicate("")
    assert clean(tmp_path).removed and not staging.exists()
    staging.mkdir()
    (staging / "lock").write_text(json.dumps(living.this_process()))
    assert run(*words).code == 0


def test_a_file_system_that_does_not_tell_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    assert Runner(capsys)("convert", fixture_path(SOURCE), tmp_path / "out", "--to", "hf").code == 0


@pytest.fixture
def open_files_keep_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS and FUSE: a file that is removed while this process has it open has another name until it is closed."""
    left: dict[int, str] = {}
    unlink, close = os.unlink, os.close

    def is_of(descriptor: int, status: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), status)
        except OSError:
            return False

    def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        holder = next((number for number in range(3, 200) if is_of(number, status)), None)
        if holder is None or not os.fspath(path).endswith(("lock", "1-of-1")):
            unlink(path, dir_fd=dir_fd)
            return
        folder = os.path.dirname(path) if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        left[holder] = os.path.join(folder, ".nfs01")
        os.rename(path, left[holder], src_dir_fd=dir_fd)

    def closing(descriptor: int) -> None:
        close(descriptor)
        hidden = left.pop(descriptor, None)
        if hidden is not None:
            unlink(hidden)

    monkeypatch.setattr(os, "unlink", unlinking)
    monkeypatch.setattr(os, "close", closing)


@pytest.mark.usefixtures("open_files_keep_names")
def test_nothing_is_left_where_open_files_keep_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Runner(capsys)
    assert run("convert", fixture_path(SOURCE), tmp_path / "out", "--to", "hf").code == 0
    assert os.listdir(tmp_path) == ["out"]
    abandoned = StagingDirectory(str(tmp_path / "other"))
    os.mkdir(abandoned.directory)
    assert abandoned.remove_abandoned()
    assert os.listdir(tmp_path) == ["out"]
