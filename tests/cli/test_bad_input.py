"""Bad input: one line that names file and tensor, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.bad_inputs import UNMAPPABLE, UNREADABLE, Build
from tests.cli.runner import Runner
from tests.support import fixture_path

MALICIOUS = sorted(path.name for path in fixture_path("legacy/malicious").glob("*.pt"))


NOTHING_TO_CHECK = ("missing_path", "empty_directory", "named_pipe")
"""What is no checkpoint at all, or not there; all else is damage."""


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("build", "text"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_read(anyckpt: Runner, tmp_path: Path, build: Build, text: str) -> None:
    path = build(tmp_path)
    before = snapshot(tmp_path)
    started = time.process_time()
    shown = anyckpt("inspect", path, "--json").error
    assert str(tmp_path) in shown
    assert text in shown
    assert text in anyckpt("convert", path, tmp_path / "out", "--to", "torch").error
    found = anyckpt("verify", path)
    assert text in found.out + found.err
    assert found.code == (2 if build.__name__ in NOTHING_TO_CHECK else 1)
    assert text in anyckpt("diff", path, path).error
    assert time.process_time() - started < 4
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["megatron-core", "nemo"])
@pytest.mark.parametrize(("build", "text"), UNMAPPABLE.values(), ids=UNMAPPABLE.keys())
def test_what_is_no_model_of_its_family(anyckpt: Runner, tmp_path: Path, build: Build, text: str, target: str) -> None:
    path = build(tmp_path)
    before = snapshot(tmp_path)
    assert text in anyckpt("convert", path, tmp_path / "out", "--to", target).error
    assert snapshot(tmp_path) == before
    assert anyckpt("inspect", path).code == 0


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_files_do_nothing(
    anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = fixture_path("legacy/malicious") / name
    for words in (("inspect", path), ("inspect", path, "--json", "--stats", "--digest"), ("verify", path, "--deep")):
        started = time.process_time()
        found = anyckpt(*words)
        assert time.process_time() - started < 1
        assert found.code in ((0, 1, 2) if words[0] == "verify" else (0, 2))
        if found.code == 2:
            assert str(path) in found.error
    assert not list(tmp_path.iterdir())
    found = anyckpt("convert", path, tmp_path / "out", "--to", "safetensors", "--json")
    assert found.code in (0, 2)
    assert found.code == 0 or not list(tmp_path.iterdir())


def test_malicious_files_take_little_memory_and_leave_no_marker(tmp_path: Path) -> None:
    code = """
import sys
from anyckpt.cli import run
from anyckpt.engine.execute import peak_rss_bytes
for path in sys.argv[1:]:
    run(["inspect", path, "--stats"])
print("PEAK", peak_rss_bytes(), file=sys.stderr)
"""
    files = [str(fixture_path("legacy/malicious") / name) for name in MALICIOUS]
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stderr.rpartition("PEAK ")[2]) < 200e6
    assert not os.listdir(tmp_path)
    assert "Traceback" not in done.stderr
