"""Running the command line inside the test process."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anyckpt.cli import run


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output, and nothing else there."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error, which is all that the command printed."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("error: ").rstrip("\n")

    @property
    def damage(self) -> str:
        """What ``verify`` says is wrong with a checkpoint that keeps it from being opened."""
        assert self.code == 1, (self.code, self.err)
        *problems, verdict = self.out.splitlines()
        assert verdict.endswith("damaged (1 problem)"), self.out
        return "\n".join(problems)


class Runner:
    """Call it with the words of a command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Result:
        self._capsys.readouterr()
        code = run([str(word) for word in words])
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def shown_on(terminal: int, process: subprocess.Popen[bytes]) -> str:
    """What a process that succeeds sends to a terminal, whose own side is a descriptor, which is closed."""
    seen = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(terminal)
    assert process.wait() == 0
    return seen.decode()
