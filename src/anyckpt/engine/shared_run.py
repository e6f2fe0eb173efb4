"""Carrying out one plan by several processes, on one host or on many, which share nothing but the destination.

Each makes the plan and writes its share of the blocks; when the records of all shares are there, any of them finishes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Protocol

from anyckpt.data_classes import dataclass
from anyckpt.engine.blocks import cut_all
from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.execute import DEFAULT_MEMORY, Report, carry_out, place_of, report_of
from anyckpt.engine.files import write_error
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import Trouble
from anyckpt.engine.run import Progress, Run, worker_count
from anyckpt.engine.share import Division
from anyckpt.errors import OutputError, UsageError

_POLL_SECONDS = 0.2
_LONGEST_POLL_SECONDS = 2.0
_BEAT_SECONDS = 5.0
_SILENT_BEATS = 3  # without so many, what no lock is seen of is no longer at work
_SHOWN = 8


@dataclass(frozen=True)
class ShareReport:
    """What one process did of a plan that several carry out.

    Attributes:
        share: which part of the work.
        bytes_read: bytes read from sources.
        bytes_written: bytes of the share.
        seconds: wall time.
        resumed_bytes: bytes of the share that were there already.
    """

    share: Share
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_bytes: int = 0


class SharedRun:
    """A plan that several processes carry out, as one of them sees it.

    Args:
        plan: the same in every process.
        destination: a path, or something else that can hold files, that every process reaches.
        of: number of shares.
        overwrite: replace what is there, at the end.
        workers: threads of this process; as many as processors, up to 8, if None.
        memory: bytes for this process's blocks in flight.
        source_paths: files or directories that the plan reads.

    Raises:
        UsageError: ``memory`` is too small for one thread, something in the plan has no identity, or bytes are owned
            by a process that has no share.
    """

    def __init__(
        self,
        plan: Plan,
        destination: str | Destination,
        of: int,
        *,
        overwrite: bool = False,
        workers: int | None = None,
        memory: int = DEFAULT_MEMORY,
        source_paths: Sequence[str] = (),
    ) -> None:
        self._plan = plan
        self._place = place_of(destination, overwrite)
        self._workers = worker_count(workers, memory, plan, waits=self._place.in_order)
        self._memory = memory
        self._identity = fingerprint(plan, source_paths)
        if self._identity.obstacle is not None:
            raise UsageError(
                "cannot be divided between processes, because part of it has no identity: they cannot tell that their "
                "work is the same",
                path=self._place.name,
                found=self._identity.obstacle,
                remedy="write it with one process",
            )
        self._cut = cut_all(plan.files, owned=self._identity.owned)
        self._division = Division(plan, self._cut, of, self._place)

    def renewed(self, plan: Plan, destination: str | Destination, marker: str, *, overwrite: bool = False) -> SharedRun:
        """The same work again with other contents of the same lengths, and for another output.

        Args:
            plan: with parts of the very lengths of this one's; nothing in it is looked at.
            destination: as for the constructor, and of the same kind as there.
            marker: tells the contents from those of all other work.
            overwrite: as for the constructor.
        """
        other = copy(self)
        other._plan = plan
        other._place = place_of(destination, overwrite)
        value = hashlib.sha256(f"{self._identity.value} {marker}".encode()).hexdigest()
        other._identity = replace(self._identity, value=value)
        return other

    def write(self, share: Share, progress: Progress | None = None) -> ShareReport:
        """Write one share; what another process left of it is continued, and nothing is published.

        Args:
            share: which.
            progress: called with (bytes done, bytes of the share) from any thread.

        Raises:
            OutputError: the destination exists, other processes write another plan there or divide it otherwise,
                another one does this share, or the disk is full.
            FormatError: a source turns out to be damaged.
        """
        started = time.monotonic()
        plan, place = self._plan, self._place
        blocks = list(self._division.blocks(share))
        total = sum(block.nbytes for block in blocks)
        try:
            if not place.is_published(self._identity.value):
                place.begin(plan, self._identity.value, share=share, resume=True)
        except BusyError:
            if share in self.missing():
                raise
            return ShareReport(share, 0, total, time.monotonic() - started, total)  # another one is publishing it all
        except OutputError:
            if not place.is_published(self._identity.value):
                raise
        if place.is_published(self._identity.value):
            return ShareReport(share, 0, total, time.monotonic() - started, total)
        try:
            known = place.records(self._identity.value)
            run = Run(
                plan,
                self._cut,
                place,
                known,
                workers=self._workers,
                memory=self._memory,
                progress=progress,
                total=total,
                ends=self._division.ends,
            )
            with beating(place):
                run.write(blocks)
            self._identity.check_unchanged()
            run.sync()
        except OSError as error:
            place.close(failure=str(error))
            raise write_error(place.name, error) from error
        except BaseException as error:
            place.close(failure=str(error) or type(error).__name__)
            raise
        place.close()
        return ShareReport(share, run.reads.nbytes, total, time.monotonic() - started, run.resumed_bytes)

    def missing(self) -> dict[Share, int]:
        """Shares that are not whole -> the bytes that are missing of them; none if the output is published.

        Raises:
            OutputError: other work is there.
        """
        value = self._identity.value
        missing = self._division.missing(self._place.records(value))
        return {} if missing and self._place.is_published(value) else missing

    def notes(self) -> tuple[str, ...]:
        """What the place of the output could not give of what is promised elsewhere."""
        return self._place.weaker()

    def finish(self, wait: float = 0.0) -> Report:
        """Write what the shares leave, and publish the output, when all of them are there.

        Any process may call it, also several: one does it, the others find it done.

        Args:
            wait: seconds to wait for shares that are not whole, counted anew whenever one of them shows that its
                process is at work; when none of their processes is, it is given up at once.

        Raises:
            BusyError: another process finishes it at this moment.
            OutputError: shares are not whole in time, each named with what is known of it, or the disk is full.
        """
        started = time.monotonic()
        plan, place, identity = self._plan, self._place, self._identity
        watch, pauses = Watch(wait), pausing()
        missing = self.missing()
        while True:
            if watch.looks_other(place):
                missing = self.missing()
            late = watch.is_over(missing)
            if place.is_published(identity.value):
                return replace(report_of(plan, place, 0, started, plan.nbytes), published=False)
            if not missing:
                try:
                    place.begin(plan, identity.value, share=None, resume=True)
                except OutputError as error:
                    if place.is_published(identity.value):
                        continue
                    if late or not isinstance(error, BusyError):
                        raise
                else:
                    return carry_out(
                        plan, self._cut, place, identity, self._workers, self._memory, None, started, shared=True
                    )
            elif late:
                raise self._unfinished(missing, watch)
            next(pauses)

    def _unfinished(self, missing: dict[Share, int], watch: Watch) -> OutputError:
        return OutputError(
            "cannot be finished, because not all of it is written",
            path=self._place.name,
            found=watch.told_of(missing),
            remedy=watch.remedy(missing),
        )


class Watched(Protocol):
    """Where processes show one another that they are at work; see ``Destination``."""

    def beat(self) -> None: ...

    def signs(self) -> dict[Share, int]: ...

    def troubles(self) -> dict[Share, Trouble]: ...


class Watch:
    """What one process sees of others that it waits for, by its own clock alone.

    Args:
        wait: seconds without any sign of them after which it gives up.
    """

    def __init__(self, wait: float) -> None:
        self._wait = wait
        self._began = time.monotonic()
        self._whole = 0.0
        self._last: dict[Share, tuple[object, float]] = {}
        self._signs: Mapping[Share, int] = {}
        self._troubles: Mapping[Share, Trouble] = {}

    def looks_other(self, place: Watched) -> bool:
        """Look for signs; whether what is missing may have changed since the last look."""
        before, self._signs, self._troubles = self._signs, place.signs(), place.troubles()
        return before != self._signs or not self._signs

    def is_over(self, missing: Mapping[Share, int]) -> bool:
        """Whether to give up: nothing was seen of any of them for too long, or none of them is at work any more.

        Args:
            missing: shares -> the bytes that are missing; if none are, who publishes is waited for.
        """
        now = time.monotonic()
        if not missing:
            self._whole = self._whole or now
            return now - self._whole >= self._wait
        for share, nbytes in missing.items():
            sign = (self._signs.get(share), nbytes)
            known = self._last.get(share)
            if known is None or known[0] != sign:
                self._last[share] = (sign, now if known is not None or share in self._signs else self._began)
        late = now - max(self._last[share][1] for share in missing) >= self._wait
        return late or all(self._is_dead(share, now) for share in missing)

    def _is_dead(self, share: Share, now: float) -> bool:
        trouble = self._troubles.get(share)
        silent = share in self._signs and now - self._last[share][1] > _SILENT_BEATS * _BEAT_SECONDS
        return trouble is not None and (trouble.gave_up or silent)

    def told_of(self, missing: Mapping[Share, int]) -> str:
        """What is known of shares that are missing, of which so many bytes are."""
        told = [f"share {share} ({self._told(share)}; {nbytes:,} bytes)" for share, nbytes in missing.items()]
        more = len(told) - _SHOWN
        return "missing: " + ", ".join(told[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

    def remedy(self, missing: Mapping[Share, int]) -> str:
        """What to do about shares that are missing."""
        told = "run the processes of these shares again; they go on from what is there"
        if any(share in self._signs or share in self._troubles for share in missing):
            return told
        return f"{told}; if they do run, they are on hosts that do not see the same place as this one"

    def _told(self, share: Share) -> str:
        if share in self._troubles:
            return self._troubles[share].text
        if share in self._signs:
            silent = time.monotonic() - self._last[share][1]
            return "still at work" if silent < _BEAT_SECONDS else f"silent for {silent:.0f} s"
        return "not begun" + (f" in {time.monotonic() - self._began:.0f} s" if self._wait else ", or still planning")


def pausing() -> Iterator[None]:
    """Pauses between looks at what others do, each longer than the one before."""
    pause = _POLL_SECONDS
    while True:
        time.sleep(pause)
        pause = min(_LONGEST_POLL_SECONDS, pause * 1.2)
        yield


@contextmanager
def beating(place: Watched) -> Iterator[None]:
    """Meanwhile the place shows that this process is at work."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            place.beat()

    thread = threading.Thread(target=beat, name="anyckpt-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def finish(
    plan: Plan,
    destination: str | Destination,
    of: int,
    *,
    wait: float = 0.0,
    overwrite: bool = False,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    source_paths: Sequence[str] = (),
) -> Report:
    """Publish a plan whose shares are written; see ``SharedRun``."""
    run = SharedRun(
        plan, destination, of, overwrite=overwrite, workers=workers, memory=memory, source_paths=source_paths
    )
    return run.finish(wait)
