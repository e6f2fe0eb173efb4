"""A trainer's side of the process that writes for it: it copies, hands over, and learns later how it went."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from anyckpt.engine.copied import Copies, Copy, put, read
from anyckpt.engine.destination import Share
from anyckpt.engine.plan import Plan
from anyckpt.errors import OutputError, UsageError
from anyckpt.operations.writer_process import Discard, Finish, Job, Outcome, Upkeep, is_readable, send, take
from anyckpt.storage.shared_memory import SharedMemory

_ENDS_SECONDS = 5.0
_NOTICE_SECONDS = 1.0


class BackgroundWriter:
    """A process that writes plans, one after another, from copies of what they read.

    It is started here, once, imports no torch, and sees no accelerator.  It ends when this process does, however that
    ends: at once if it is killed, and then what was being written is unfinished; ``close`` waits for it.  If it is
    killed itself, what it had not written has failed, and the next ``submit`` starts another one.

    Memory for copies is kept and used again.  There is as much as plans were being written at once, and it is shared
    memory of the system without a name, which goes with the processes.

    Args:
        memory: makes the memory for copies.
        copy: copies live state into it.
    """

    def __init__(self, *, memory: Callable[[], SharedMemory] = SharedMemory, copy: Copy = read) -> None:
        self._make_memory = memory
        self._copy = copy
        self._owner = os.getpid()
        self._free: list[tuple[int, SharedMemory]] = []
        self._used: dict[int, tuple[int, SharedMemory, str]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._sent: set[int] = set()
        self._finishing: set[int] = set()
        self._made = 0
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """The number of the process that writes, None if there is none now."""
        return None if self._process is None else self._process.pid

    def submit(
        self,
        plan: Plan,
        destination: str,
        *,
        share: Share | None = None,
        key: str = "",
        overwrite: bool = False,
        workers: int | None = None,
        upkeep: Upkeep | None = None,
        kept: list[Copies] | None = None,
    ) -> int:
        """Copy what a plan reads and have it written; the number by which its outcome is asked for.

        When this returns, live state may change.

        Args:
            plan: what to write.
            destination: path of the output.
            share: which share of the plan this process supplies and writes; None if it does all of it.
            key: with a share, names these contents and no others, in all processes that have one.
            overwrite: replace what is there, at the end.
            workers: threads that write; as for ``execute``.
            upkeep: what follows publication.
            kept: as for ``copied.put``; it holds what plans read.

        Raises:
            OutputError: there is not enough memory, or the process cannot be started.
            FormatError: a source turns out to be damaged.
            UsageError: this is a fork of the process to which the writer belongs.
        """
        self._check_owner()
        self._listen(0.0)
        if self._channel is None:
            self._start()
        number, memory = self._free.pop() if self._free else (self._made, self._make_memory())
        self._made = max(self._made, number + 1)
        try:
            where = put(plan, None if share is None else share.number, memory, number, self._copy, kept)
        except BaseException:
            self._free.append((number, memory))
            raise
        self._number += 1
        job = Job(self._number, destination, number, where, share, key, overwrite, workers, upkeep)
        self._used[job.number] = number, memory, destination
        self._tell(job, [] if number in self._sent else [memory.descriptor])
        self._sent.add(number)
        return job.number

    def discard(self, destination: str) -> None:
        """Have unfinished work of an output removed, after everything that was submitted before."""
        self._check_owner()
        if self._channel is not None:
            self._tell(Discard(destination), [])

    def finish(self, number: int) -> Outcome:
        """Publish what another process should have published; only the first share can be asked for that.

        Args:
            number: which, as ``submit`` gave it; its outcome is known, and all shares are written.
        """
        self._check_owner()
        if self._channel is None:
            self._start()
        self._outcomes.pop(number, None)
        self._finishing.add(number)
        self._tell(Finish(number), [])
        outcome = self.outcome(number)
        assert outcome is not None
        return outcome

    def outcome(self, number: int, wait: float | None = None) -> Outcome | None:
        """How a plan went; None if that is not known yet.

        Args:
            number: which, as ``submit`` gave it.
            wait: seconds to wait for it; None for as long as it takes.
        """
        self._check_owner()
        until = None if wait is None else time.monotonic() + wait
        self._listen(0.0)
        while number not in self._outcomes:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._listen(_NOTICE_SECONDS if left is None else min(left, _NOTICE_SECONDS))
        return self._outcomes[number]

    def close(self, wait: float | None = None) -> None:
        """Wait for what was submitted, end the process, and give the memory back.

        Args:
            wait: seconds; None for as long as it takes.
        """
        if self._owner != os.getpid():
            return
        until = None if wait is None else time.monotonic() + wait
        for number in list(self._used):
            self.outcome(number, None if until is None else max(0.0, until - time.monotonic()))
        self._end()
        for _, memory in (*self._free, *((number, memory) for number, memory, _ in self._used.values())):
            memory.close()
        self._free, self._used = [], {}

    # -- the process -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        code = "from anyckpt.operations.writer_process import main; main()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            )
        except OSError as error:
            ours.close()
            raise OutputError("the process that writes cannot be started", found=error.strerror) from error
        finally:
            theirs.close()
        self._channel = ours
        self._sent.clear()

    def _tell(self, message: Job | Discard | Finish, descriptors: list[int]) -> None:
        assert self._channel is not None
        try:
            send(self._channel, message, descriptors)
        except OSError:
            self._died()

    def _listen(self, wait: float) -> None:
        """Take in what the process says, for so many seconds; note it if it is gone."""
        while self._channel is not None and is_readable(self._channel, wait):
            try:
                outcome, _ = take(self._channel)
            except (EOFError, OSError):
                self._died()
                return
            self._note(outcome)
            wait = 0.0

    def _note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.number] = outcome
        if outcome.number in self._used:
            number, memory, _ = self._used.pop(outcome.number)
            self._free.append((number, memory))
        self._finishing.discard(outcome.number)

    def _died(self) -> None:
        """The process is gone, and with it what it had not written."""
        status = self._end()
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
        lost = {number: destination for number, (_, _, destination) in self._used.items()}
        for number in (*lost, *self._finishing):
            failure = OutputError(
                "is not saved, because the process that wrote it ended",
                path=lost.get(number),
                found=how,
                remedy="save again; another process is started",
            )
            self._note(Outcome(number, failure))

    def _end(self) -> int | None:
        """End the process; what it ended with."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if channel is not None:
            channel.close()
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_ENDS_SECONDS)
        process.kill()
        return process.wait()

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise UsageError(
                "the writer belongs to another process", remedy="save in the process that made it, not in a fork of it"
            )
