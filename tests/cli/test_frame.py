"""What holds for every command: exit codes, one-line errors, clean standard output."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
from tests.cli.runner import Runner, shown_on
from tests.support import fixture_path

import anyckpt.cli
from anyckpt import cli

COMMANDS = ("inspect", "convert", "diff", "verify", "unpack", "pack", "edit")


def test_the_version_is_the_packages(anyckpt: Runner) -> None:
    found = anyckpt("--version")
    assert (found.code, found.out) == (0, f"anyckpt {metadata.version('anyckpt')}\n")


def test_help_lists_every_command(anyckpt: Runner) -> None:
    found = anyckpt("--help")
    assert found.code == 0
    listed = [line.split()[0] for line in found.out.partition("Commands:")[2].splitlines() if line.strip()]
    assert [word for word in listed if word in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(anyckpt: Runner, name: str) -> None:
    found = anyckpt(name, "--help")
    assert found.code == 0
    assert found.out.startswith(f"Usage: anyckpt {name}")
    assert cli._COMMANDS[name]


@pytest.mark.parametrize(
    "words", [("nonsense",), ("inspect",), ("inspect", "a", "--nonsense"), ("diff", "a", "b", "--rtol", "x")]
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(anyckpt: Runner, words: tuple[str, ...]) -> None:
    assert "--help" in anyckpt(*words).error


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(anyckpt.cli._LazyGroup, "get_command", lambda *_: command)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "/disk/out"), "/disk/out: No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (MemoryError(), "not enough memory"),
        (RecursionError("x"), None),
    ],
)
def test_system_errors_are_one_line(
    anyckpt: Runner, monkeypatch: pytest.MonkeyPatch, error: BaseException, text: str | None
) -> None:
    failing(monkeypatch, error)
    if text is None:
        assert anyckpt("inspect").code == 70
    else:
        assert text in anyckpt("inspect").error


def test_a_defect_shows_its_traceback_and_is_no_verdict(anyckpt: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyError("x"))
    found = anyckpt("inspect")
    assert found.code == 70
    assert "Traceback" in found.err
    assert found.out == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_130(anyckpt: Runner, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(monkeypatch, error)
    found = anyckpt("inspect")
    assert (found.code, found.err.lstrip()) == (130, "error: interrupted\n")


def test_terminal_escapes_in_names_are_not_sent_to_the_terminal(anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt("inspect", tmp_path / "evil\x1b[2Jname\n\u202etxt")
    assert "\\x1b[2Jname" in found.error
    assert "\x1b" not in found.err
    assert "\u202e" not in found.err


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    path = fixture_path("families/llama/hf")
    command = f"{sys.executable} -m anyckpt.cli inspect {path} --tensors '*' --stats | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "path" in done.stdout
    assert done.stderr == ""


def in_a_terminal(*words: str | Path, **environment: str) -> str:
    """What a command sends to a terminal of 200 columns."""
    import os
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "anyckpt.cli", *map(str, words)],
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environment},
    )
    os.close(child)
    return shown_on(parent, process)


def test_colour_on_a_terminal_unless_it_is_not_wanted() -> None:
    words = ("inspect", fixture_path("families/llama/hf"))
    assert "\x1b[36m" in in_a_terminal(*words)
    assert "\x1b[36m" not in in_a_terminal(*words, NO_COLOR="1")


def test_long_work_shows_a_bar_with_bytes_and_rate_on_a_terminal(tmp_path: Path) -> None:
    import json
    import struct

    size = 200_000_000
    header = json.dumps({"w": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    seen = in_a_terminal("inspect", path, "--stats")
    assert "reading" in seen
    assert "/200.0 MB" in seen
    assert "MB/s" in seen


def test_no_colour_and_no_bar_where_there_is_no_terminal(anyckpt: Runner) -> None:
    found: Any = anyckpt("inspect", fixture_path("families/llama/hf"), "--tensors", "*", "--digest")
    assert "\x1b" not in found.out + found.err
    assert found.err == ""


def test_columns_are_aligned_and_rich_is_not_imported_where_there_is_no_terminal() -> None:
    code = """
import sys
from anyckpt.cli.tables import Column, print_table
print_table(("name", Column("n", right=True)), [("a", "10"), ("long", "9")], title="Title")
print("rich" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Title\nname   n\na     10\nlong   9\nFalse\n"


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(anyckpt: Runner) -> None:
    done = anyckpt()
    assert (done.code, done.out) == (2, "")
    assert "\n  inspect " in done.err
    assert not done.err.startswith("error")


def test_names_beyond_the_terminals_encoding_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "mödel.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    words = [sys.executable, "-m", "anyckpt.cli", "inspect", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "m\\xf6del" in done.stdout


def test_a_closed_standard_output_is_no_defect() -> None:
    path = fixture_path("families/llama/hf")
    command = f"{sys.executable} -m anyckpt.cli inspect {path} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
