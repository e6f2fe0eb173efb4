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
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from anyckpt.engine.destination import BusyError, Share
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import Plan
from anyckpt.engine.shared_run import SharedRun
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import AnyckptError, OutputError
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_upkeep import published, write_note
from anyckpt.storage.shared_memory import receive, received

_HEAD = 8
_LOOK_SECONDS = 1.0


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
    jobs: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_work, args=(channel, jobs), daemon=True).start()
    descriptors: dict[int, int] = {}
    while os.getppid() == parent:
        if not is_readable(channel, _LOOK_SECONDS):
            continue
        try:
            message, received = take(channel)
        except (EOFError, OSError):
            break
        if received:
            descriptors[message.memory] = received[0]
            receive(message.memory, received[0])
        jobs.put(message)
    os._exit(0)


def _work(channel: socket.socket, jobs: SimpleQueue[Any]) -> None:
    while True:
        message = jobs.get()
        if isinstance(message, Discard):
            with suppress(OSError):
                StagingDirectory(message.destination).remove_abandoned()
            continue
        outcome = _done(message)
        with suppress(OSError):
            send(channel, outcome)


def _done(job: Job) -> Outcome:
    began = time.monotonic()
    try:
        return _written(job, began)
    except AnyckptError as error:
        return Outcome(job.number, error, seconds=time.monotonic() - began)
    except BaseException as error:
        told = traceback.format_exc()
        print(told, file=sys.stderr, flush=True)
        last = told.strip().splitlines()[-1]
        failure = OutputError("cannot be written", path=job.destination, found=last or type(error).__name__)
        return Outcome(job.number, failure, seconds=time.monotonic() - began)


def _written(job: Job, began: float) -> Outcome:
    plan: Plan = pickle.loads(received(job.memory, *job.plan))
    if job.share is None:
        _announce(job)
        nbytes = execute(plan, job.destination, overwrite=job.overwrite, workers=job.workers).bytes_written
        is_published = True
    else:
        run = SharedRun(plan, job.destination, job.share.of, overwrite=job.overwrite, workers=job.workers)
        run = run.renewed(plan, job.destination, job.key, overwrite=job.overwrite)
        nbytes = run.write(job.share).bytes_written
        is_published = False
        if not run.missing():
            _announce(job)
            with suppress(BusyError):  # another process that found all shares there publishes it
                run.finish()
                is_published = True
    deleted: list[str] = []
    if is_published and job.upkeep is not None:
        folder = os.path.dirname(job.destination)
        try:
            deleted = published(folder, job.upkeep.rules, pointer=job.upkeep.pointer)
        except (AnyckptError, OSError) as error:
            failure = OutputError(f"is saved, but what should follow failed: {error}", path=job.destination)
            return Outcome(job.number, failure, True, (), nbytes, time.monotonic() - began)
    return Outcome(job.number, None, is_published, tuple(deleted), nbytes, time.monotonic() - began)


def _announce(job: Job) -> None:
    if job.upkeep is not None:
        write_note(job.destination, job.upkeep.saved)


if __name__ == "__main__":
    main()
