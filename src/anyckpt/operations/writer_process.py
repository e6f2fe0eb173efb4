"""The process beside a trainer that writes what the trainer copied: it has no torch, no accelerator, and no part of the
trainer's interpreter.

It does one thing after another, says how each went, and ends at once, wherever it is, when its trainer is gone: what it
was writing is then unfinished work, of which nothing has the name of a checkpoint.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import BusyError, Share
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import Plan
from anyckpt.engine.shared_run import SharedRun
from anyckpt.errors import AnyckptError, OutputError
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_upkeep import published, write_note
from anyckpt.operations.steps.unfinished import remove_abandoned
from anyckpt.operations.steps.writing import NOTHING_SAID, destination_at
from anyckpt.storage.shared_memory import receive, received

_HEAD = 8
_LOOK_SECONDS = 1.0
_LATE_SECONDS = 60.0
_KEPT = 4


@dataclass(frozen=True)
class Upkeep:
    """What follows the publication of a checkpoint in a run's folder.

    Attributes:
        saved: what its note says, which is written just before.
        rules: which checkpoints of the folder stay.
        pointer: whether ``latest`` is made to lead to the newest.
    """

    saved: Saved
    rules: Retention
    pointer: bool = True


@dataclass(frozen=True)
class Job:
    """Something to write.

    Attributes:
        number: which; the outcome has the same.
        destination: path of the output.
        memory: number of the shared memory that has the plan and what it reads.
        plan: where the plan lies in it: first byte and length.
        share: this process's share of the work; None if it does all of it.
        key: with a share, names these contents and no others, in all processes that have one.
        overwrite: replace what is there, at the end.
        workers: threads; as for ``execute``.
        upkeep: what follows publication, if anything.
    """

    number: int
    destination: str
    memory: int
    plan: tuple[int, int]
    share: Share | None = None
    key: str = ""
    overwrite: bool = False
    workers: int | None = None
    upkeep: Upkeep | None = None


@dataclass(frozen=True)
class Discard:
    """Unfinished work to remove, if nobody is at it.

    Attributes:
        destination: of what output.
    """

    destination: str


@dataclass(frozen=True)
class Finish:
    """A job of the first share that nobody published, though all shares are written: to be published now.

    The process that was ready last may not have seen all records, where a file system shows other hosts' files late.

    Attributes:
        number: of the job.
    """

    number: int


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        number: which.
        error: why it is not written; None if this process's part of it is.
        published: whether this process published it: it was the last to be ready.
        deleted: checkpoints that were deleted then.
        bytes_written: of this process.
        seconds: from its begin.
    """

    number: int
    error: AnyckptError | None = None
    published: bool = False
    deleted: tuple[str, ...] = ()
    bytes_written: int = 0
    seconds: float = 0.0


def send(to: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    """Send something that can be pickled, and open files with it.

    Raises:
        OSError: the other process is gone.
    """
    data = pickle.dumps(message)
    head = len(data).to_bytes(_HEAD, "little")
    if descriptors:
        socket.send_fds(to, [head], list(descriptors))
    else:
        to.sendall(head)
    to.sendall(data)


def is_readable(source: socket.socket, seconds: float) -> bool:
    """Whether a message comes, or the other process ends, in so many seconds."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def take(source: socket.socket) -> tuple[Any, list[int]]:
    """The next message, and the open files that came with it.

    Raises:
        EOFError: the other process is gone.
        OSError: likewise.
    """
    head, descriptors, _, _ = socket.recv_fds(source, _HEAD, 8)
    if not head:
        raise EOFError
    head += _exactly(source, _HEAD - len(head))
    return pickle.loads(_exactly(source, int.from_bytes(head, "little"))), descriptors


def _exactly(source: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = source.recv(nbytes - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main() -> None:
    """Be the writer of the process whose number is the second argument, over the socket that the first one names."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    parent = int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the trainer decides what it means
    writer = _Writer(channel)
    while os.getppid() == parent:
        if not is_readable(channel, _LOOK_SECONDS):
            continue
        try:
            message, descriptors = take(channel)
        except (EOFError, OSError):
            break
        if descriptors:
            receive(message.memory, descriptors[0])
        writer.messages.put(message)
    writer.messages.put(None)
    while os.getppid() == parent and writer.thread.is_alive():  # it has closed, and waited for all but what it discards
        writer.thread.join(0.05)
    os._exit(0)


class _Writer:
    """Does what it is told, one thing after another, in a thread of its own.

    Args:
        channel: where outcomes go.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._late: dict[int, tuple[SharedRun, Job]] = {}
        self.messages: SimpleQueue[Job | Discard | Finish | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (message := self.messages.get()) is not None:
            if isinstance(message, Discard):
                remove_abandoned(message.destination)
                continue
            outcome = self._done(message)
            with suppress(OSError):
                send(self._channel, outcome)

    def _done(self, message: Job | Finish) -> Outcome:
        began = time.monotonic()
        try:
            outcome = self._finished(message) if isinstance(message, Finish) else self._written(message)
        except AnyckptError as error:
            outcome = Outcome(message.number, error)
        except BaseException as error:
            told = traceback.format_exc()
            print(told, file=sys.stderr, flush=True)
            found = told.strip().splitlines()[-1] or type(error).__name__
            outcome = Outcome(message.number, OutputError("cannot be written", found=found))
        return replace(outcome, seconds=time.monotonic() - began)

    def _written(self, job: Job) -> Outcome:
        plan: Plan = pickle.loads(received(job.memory, *job.plan))
        place = destination_at(job.destination, overwrite=job.overwrite, said=NOTHING_SAID)
        if job.share is None:
            _announce(job)
            nbytes = execute(plan, place, overwrite=job.overwrite, workers=job.workers).bytes_written
            return _followed(job, Outcome(job.number, published=True, bytes_written=nbytes))
        run = SharedRun(plan, place, job.share.of, overwrite=job.overwrite, workers=job.workers)
        run = run.renewed(plan, place, job.key, overwrite=job.overwrite)
        outcome = Outcome(job.number, bytes_written=run.write(job.share).bytes_written)
        if not run.missing():
            _announce(job)
            with suppress(BusyError):  # another process that found all shares there publishes it, or has
                if run.finish().published:
                    return _followed(job, replace(outcome, published=True))
        if job.share.number == 1:
            self._late = dict([*self._late.items(), (job.number, (run, job))][-_KEPT:])
        return outcome

    def _finished(self, message: Finish) -> Outcome:
        if message.number not in self._late:
            raise OutputError("is written and not published, and the process that wrote it ended", remedy="save again")
        run, job = self._late.pop(message.number)
        _announce(job)
        run.finish(wait=_LATE_SECONDS)
        return _followed(job, Outcome(job.number, published=True))


def _announce(job: Job) -> None:
    if job.upkeep is not None:
        write_note(job.destination, job.upkeep.saved)


def _followed(job: Job, outcome: Outcome) -> Outcome:
    """What follows publication, done."""
    if job.upkeep is None:
        return outcome
    try:
        deleted = published(os.path.dirname(job.destination), job.upkeep.rules, pointer=job.upkeep.pointer)
    except (AnyckptError, OSError) as error:
        failure = OutputError(f"is saved, but what should follow failed: {error}", path=job.destination)
        return replace(outcome, error=failure)
    return replace(outcome, deleted=tuple(deleted))


if __name__ == "__main__":
    main()
