"""Progress where there is no terminal, and what is said to who interrupts."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.runner import Runner

import anyckpt as api
from anyckpt.cli import console

_SIZE = 24 << 20


def large(path: Path) -> Path:
    """A file of a few blocks."""
    header = json.dumps({"w": {"dtype": "I8", "shape": [_SIZE], "data_offsets": [0, _SIZE]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + _SIZE)
    return path


@contextmanager
def interrupting(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> Iterator[None]:
    taken = threading.Event()

    def take(*_: object) -> None:
        taken.set()
        raise KeyboardInterrupt

    def update(self: console._Log, done: int, total: int) -> None:
        if when(done) and not taken.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert taken.wait(60)  # however busy the machine, the main thread takes the signal before this one goes on

    before = signal.signal(signal.SIGINT, take)
    monkeypatch.setattr(console._Log, "update", update)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_log_gets_lines_with_bytes_rate_and_time_left(
    anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large(tmp_path / "large.safetensors")
    assert anyckpt("convert", path, tmp_path / "quick.pt").err == ""
    monkeypatch.setattr(console, "_LOG_SECONDS", 0.0)
    lines = anyckpt("convert", path, tmp_path / "slow.pt", "--workers", "1").err.splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("converting: ") and " of 25.2 MB (" in line and "/s" in line for line in lines)
    assert " left" in lines[1]


def test_lines_come_every_half_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    log = console._Log("converting")
    for second in range(0, 95, 5):
        now = 100.0 + second
        log.update(2_000_000_000 + second * 100_000_000, 20_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "converting: 5.00 GB of 20.0 GB (25 %), 100 MB/s, 2 min 30 s left",
        "converting: 8.00 GB of 20.0 GB (40 %), 100 MB/s, 2 min 00 s left",
        "converting: 11.0 GB of 20.0 GB (55 %), 100 MB/s, 1 min 30 s left",
    ]


def test_who_interrupts_is_told_how_to_go_on(anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = large(tmp_path / "large.safetensors"), tmp_path / "out.pt"
    with monkeypatch.context() as patch, interrupting(patch, lambda done: done > _SIZE // 2):
        done = anyckpt("convert", path, output, "--workers", "1")
    assert done.code == 130
    assert (
        done.err.startswith("error: interrupted at ") and " of 25.2 MB; run the same command with --resume" in done.err
    )
    found = anyckpt("convert", path, output, "--workers", "1", "--resume", "--json").json
    assert found["resumed_bytes"] > 0
    assert api.diff(path, output).equal


def test_who_interrupts_before_anything_is_written_is_told_that(
    anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anyckpt.operations.convert.convert", interrupted)
    done = anyckpt("convert", tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert (done.code, done.err) == (130, "error: interrupted before anything was written\n")
