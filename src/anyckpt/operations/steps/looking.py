"""Looking at every byte of something that is only read, by this process or by several that each take a share.

Each process opens what is looked at, which is cheap, and finds the same units of work; it looks at those of its share
and records what it found.  Who has the records of all goes the way of a single process, with what was found in place of
reading, so that its answer is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.operations.steps.threads import Advance, Progress
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Unit:
    """What one process looks at alone.

    Attributes:
        key: tells it from all others of one work.
        nbytes: read for it.
        look: what is found there, in values that JSON has.
        tensors: that it reads.
        sources: that it reads besides.
    """

    key: str
    nbytes: int
    look: Callable[[Advance], Any]
    tensors: Sequence[LazyTensor] = ()
    sources: Sequence[ByteSource] = ()


@dataclass(frozen=True)
class LookedAt:
    """What one of several processes did, which is not the answer.

    Attributes:
        share: ``I/N``.
        missing_shares: those without which there is no answer yet; none if another process gives it.
        bytes_read: in this share.
        seconds: that it took.
    """

    share: str
    missing_shares: tuple[str, ...]
    bytes_read: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As commands print it with ``--json``."""
        return {**vars(self), "missing_shares": list(self.missing_shares)}

    def not_known(self) -> UsageError:
        """The error of who asks for the answer."""
        return UsageError(
            f"this is share {self.share} of the work, which is no answer",
            remedy="look at `part` first: the process that has the records of all shares answers",
        )


@dataclass(frozen=True)
class Asked:
    """How the work is shared out.

    Attributes:
        share: ``I/N``, ``auto``, or None for a process that does it all.
        wait: seconds for which the first waits for a sign of the others.
        records: the folder in which the processes find one another.
        engine: ``ray``: the nodes of a Ray cluster do it, and this process answers.
        workers: with an engine, threads of each task.
    """

    share: str | None = None
    wait: float | None = None
    records: str | os.PathLike[str] | None = None
    engine: str | None = None
    workers: int | None = None


class Looking:
    """The work of a process that does all of it.

    Attributes:
        part: what this process did, if it does not answer.
    """

    part: LookedAt | None = None

    def look(self, units: Callable[[], Iterable[Unit]]) -> Mapping[str, Any]:
        """What other processes and this one have found, by key of the unit; nothing where one process does it all.

        Where ``part`` is set then, another process answers.

        Args:
            units: makes all units of the work, the same in every process.

        Raises:
            AnyckptError: of this share, or that other shares are missing.
        """
        return {}

    def end(self, *, answered: bool) -> None:
        """The answer is given, or could not be."""


@contextmanager
def looking(
    command: str,
    paths: Sequence[str | os.PathLike[str]],
    options: Mapping[str, Any],
    asked: Asked,
    progress: Progress | None,
) -> Iterator[Looking]:
    """Look at something; where several do, their records are removed when one has answered within.

    Args:
        command: what is done.
        paths: what is looked at.
        options: what else makes the answer what it is, as text shows it.
        asked: how the work is shared out.
        progress: of this process's share; with an engine, of all of the work.

    Raises:
        UsageError: the folder for records is missing or in no file system, there is nobody to wait for or to tell, or
            there is no such engine.
    """
    work = Looking()
    if asked.engine is not None:
        from anyckpt.operations.steps.ray_looking import RayLooking

        work = RayLooking(asked, progress)
    elif (asked.share, asked.wait, asked.records) != (None, None, None):
        from anyckpt.operations.steps.shared_looking import SharedLooking

        work = SharedLooking(command, [os.fspath(path) for path in paths], options, asked, progress)
    try:
        yield work
    except BaseException:
        work.end(answered=False)
        raise
    work.end(answered=True)
