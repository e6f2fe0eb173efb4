"""What commands share: JSON on standard output, tables for people, a progress bar on standard error."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from anyckpt.escaping import printable

if TYPE_CHECKING:
    from anyckpt.operations.archive import ArchiveReport
    from anyckpt.operations.steps.looking import LookedAt
    from anyckpt.pickling import Callee

Progress = Callable[[int, int], None]

_PATIENCE_SECONDS = 0.3
_SHOWN_SHARES = 8
_LOG_SECONDS = 30.0


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output; non-ASCII escaped, so that any terminal and parser takes it."""
    print(json.dumps(value, allow_nan=False))


def print_line(text: str = "") -> None:
    """A line for people on standard output, control characters escaped; wrapped if that is a terminal."""
    _print(text, sys.stdout)


def print_note(text: str) -> None:
    """A line on standard error: a warning, a log entry."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    from anyckpt.cli.tables import width, wrap_words

    line, room = printable(text), width(stream)
    if room is not None and len(line) > room:
        line = "\n".join(wrap_words(line, room, "  "))
    print(line, file=stream)


def by_reason(ignored: Mapping[str, str], shown: int = 3) -> list[str]:
    """Names left out, one line for each reason: the first few and how many more there are."""
    grouped: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        grouped.setdefault(reason, []).append(name)
    return [
        ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if names[shown:] else "") + f" ({reason})"
        for reason, names in grouped.items()
    ]


_KINDS_OF_CALLS = {
    "code": "what runs code",
    "function": "functions of other packages",
    "class": "classes of other packages",
}


def calls_line(calls: Sequence[Callee], shown: int = 3) -> str:
    """What pickles ask for by kind; empty if all of it is known to be harmless."""
    told = []
    for kind, title in _KINDS_OF_CALLS.items():
        names = [callee.name for callee in calls if callee.kind == kind]
        if names:
            more = f" and {len(names) - shown} more" if len(names) > shown else ""
            told.append(f"{title}: {', '.join(names[:shown])}{more}")
    return "; ".join(told)


def print_archive(done: ArchiveReport, as_json: bool) -> None:
    """What was done to an archive."""
    from anyckpt.units import format_bytes, format_seconds

    if as_json:
        print_json(done.to_json())
        return
    for name in done.changed:
        print_line(f"changed: {name}")
    size = format_bytes(done.bytes_written)
    print_line(f"{done.output}: {len(done.members)} files, {size} in {format_seconds(done.seconds)}")


def print_part(what: str, part: LookedAt) -> None:
    """What one of several processes did of a work on which another one answers, or will."""
    from anyckpt.units import format_bytes, format_seconds

    print_line(f"{what}: share {part.share}, {format_bytes(part.bytes_read)} in {format_seconds(part.seconds)}")
    if part.missing_shares:
        shown = ", ".join(part.missing_shares[:_SHOWN_SHARES]) + " ..." * (len(part.missing_shares) > _SHOWN_SHARES)
        print_line(f"the answer comes when all shares are done; missing: {shown}")
    else:
        print_line("another process answers")


class StoppedError(Exception):
    """Somebody ended the work; its text says how to go on."""


@contextmanager
def writing(action: str, destination: str) -> Iterator[Progress]:
    """A progress bar of work on an output that can be continued.

    Args:
        action: what is done.
        destination: where the output goes.

    Raises:
        StoppedError: somebody ended it.
    """
    last = (0, 0)
    with progress_bar(action) as show:

        def update(done: int, total: int) -> None:
            nonlocal last
            last = max(last, (done, total))
            show(done, total)

        try:
            yield update
        except KeyboardInterrupt as request:
            raise StoppedError(_how_to_go_on(destination, *last)) from request


def _how_to_go_on(destination: str, done: int, total: int) -> str:
    from anyckpt.operations.steps.writing import is_begun
    from anyckpt.units import format_bytes

    if not is_begun(destination):
        return "interrupted before anything was written"
    where = f" at {format_bytes(done)} of {format_bytes(total)}" if total else ""
    return f"interrupted{where}; run the same command with --resume to go on from there, or without it to begin anew"


@contextmanager
def progress_bar(action: str) -> Iterator[Progress]:
    """Bytes, rate and time left on standard error: a bar on a terminal, elsewhere a line every half minute.

    The bar appears when work has lasted a moment, so that quick commands neither flicker nor wait for its imports.
    What others print meanwhile (Ray, of a node that is lost) goes to standard error, as it is no part of the answer.
    """
    shown = _Bar(action) if sys.stderr.isatty() else _Log(action)
    with redirect_stdout(sys.stderr):
        try:
            yield shown.update
        finally:
            shown.close()


class _Log:
    """Lines for a log; safe to update from any thread."""

    def __init__(self, action: str) -> None:
        self._action = action
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._due = self._begin + _LOG_SECONDS
        self._first: int | None = None

    def update(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done  # what was there when the work went on
        now = time.monotonic()
        if now < self._due:
            return
        with self._lock:
            if now < self._due:
                return
            self._due = now + _LOG_SECONDS
        print_note(f"{self._action}: {_progress_line(done, total, (done - self._first) / (now - self._begin))}")

    def close(self) -> None:
        """Nothing is left open."""


def _progress_line(done: int, total: int, rate: float) -> str:
    """``12.3 GB of 140 GB (9 %), 410 MB/s, 5 min 12 s left``."""
    from anyckpt.units import format_bytes, format_seconds

    told = f"{format_bytes(done)} of {format_bytes(total)}" + (f" ({100 * done // total} %)" if total else "")
    left = f", {format_seconds((total - done) / rate)} left" if rate > 0 else ""
    return f"{told}, {format_bytes(rate)}/s{left}"


class _Bar:
    """Safe to update from any thread."""

    def __init__(self, action: str) -> None:
        self._action = action
        self._begin = time.monotonic() + _PATIENCE_SECONDS
        self._lock = threading.Lock()
        self._show: Progress | None = None
        self._hide: Callable[[], None] | None = None

    def update(self, done: int, total: int) -> None:
        if self._show is None:
            with self._lock:
                if self._show is None and time.monotonic() >= self._begin:
                    self._open()
        if self._show is not None:
            self._show(done, total)

    def close(self) -> None:
        if self._hide is not None:
            self._hide()

    def _open(self) -> None:
        from rich import progress
        from rich.console import Console

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        task = bar.add_task(self._action, total=None)
        self._hide = bar.stop
        self._show = lambda done, total: bar.update(task, completed=done, total=total)
