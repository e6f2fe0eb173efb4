"""What is done with a mutated checkpoint; a result or an ``AnyckptError`` may come of it, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyckpt
from anyckpt.errors import AnyckptError
from tests.fuzz.seeds import Tree, written

SECONDS = 20
"""Of the processor, for all that is done with one small checkpoint; a healthy one takes a tenth of one."""
MEGABYTES = 400
"""By which the process may grow over one checkpoint of a few kilobytes."""


class HangError(AssertionError):
    """It took longer than ``SECONDS``."""


class GreedyError(AssertionError):
    """It took more memory than ``MEGABYTES``."""


def exercise(tree: Tree, note: Callable[[str], Any] = lambda text: None) -> int:
    """Open, inspect, verify and convert it; the number of these that worked.

    Raises:
        Exception: any other than AnyckptError: a defect.
    """
    worked = 0
    before = _largest()
    with tempfile.TemporaryDirectory(prefix="fuzz") as name, _limit(SECONDS):
        folder = Path(name)
        path = written(tree, folder, _stays)
        outside = set(folder.iterdir())
        for step, run in _steps(path, folder).items():
            note(step)
            try:
                run()
                worked += 1
            except AnyckptError as error:
                str(error)
        made = {entry.name for entry in set(folder.iterdir()) - outside}
        assert made <= {"a.safetensors", "b", ".a.safetensors.anyckpt-manifest.json"}, made
    if _largest() - before > MEGABYTES * 1024:
        raise GreedyError(f"grew by {(_largest() - before) // 1024} MB")
    return worked


def _steps(path: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "open": lambda: anyckpt.open(path),
        "inspect": lambda: json.dumps(anyckpt.inspect(path).to_json(), allow_nan=False),
        "verify": lambda: anyckpt.verify(path, deep=True),
        "convert to safetensors": lambda: anyckpt.convert(path, folder / "a.safetensors", to="safetensors", workers=1),
        "convert to hf": lambda: anyckpt.convert(path, folder / "b", to="hf", workers=1),
        "convert to dcp": lambda: anyckpt.convert(path, folder / "c", to="dcp", optimizer="keep", dry_run=True),
    }


def _stays(path: str) -> bool:
    return ".." not in Path(path).parts and "\0" not in path


def _largest() -> int:
    """The process's largest resident set so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise HangError(f"more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
