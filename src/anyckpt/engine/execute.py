"""Carrying out a plan, by one process or by several that each do a share; then committing it.

The bytes of the output do not depend on the number of threads or processes, on the order of blocks, or on being
interrupted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from anyckpt.engine.blocks import Cut, cut_all
from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.files import write_error
from anyckpt.engine.fingerprint import Fingerprint, fingerprint
from anyckpt.engine.manifest import Manifest
from anyckpt.engine.plan import Plan
from anyckpt.engine.run import Progress, Run, of_files, worker_count
from anyckpt.engine.share import Division
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import AnyckptError, OutputError, UsageError

DEFAULT_MEMORY = 96 << 20
"""Bytes for blocks in flight; the interpreter and its libraries take some 50 MB besides."""

_POLL_SECONDS = 0.2
_SHOWN = 8


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        output: the path that now holds the output.
        format: its format.
        tensors: tensors written.
        bytes_read: bytes read from sources.
        bytes_written: size of the output.
        seconds: wall time from the first byte to the rename.
        peak_rss_bytes: the process's largest resident set so far.
        resumed_bytes: bytes that an earlier, interrupted run had written.
    """

    output: str
    format: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    resumed_bytes: int = 0


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


def execute(
    plan: Plan,
    destination: str | Destination,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    source_paths: Sequence[str] = (),
) -> Report:
    """Write a plan's files under ``destination``, durably, and give it its name only when it is whole.

    Args:
        plan: what to write.
        destination: a path that does not exist, unless ``overwrite``; or something else that can hold files.
        overwrite: replace what is there, at the end.
        resume: continue what interrupted processes left of the same plan.
        workers: threads; as many as processors, up to 8, if None, and never more than ``memory`` allows.
        memory: bytes for blocks in flight.
        progress: called with (bytes done, bytes in all) from any thread.
        source_paths: files or directories that the plan reads; a change in them makes resuming an error.

    Raises:
        OutputError: the destination exists, the disk is full, or the work to resume is of another plan.
        FormatError: a source turns out to be damaged; nothing is left behind.
        UsageError: ``memory`` is too small for one thread, or ``resume`` is asked for and something in the plan has no
            identity (``anyckpt.identity``).
    """
    started = time.monotonic()
    place = _place(destination, overwrite)
    count = worker_count(workers, memory, plan)
    identity = fingerprint(plan, source_paths)
    if resume and identity.obstacle is not None:
        raise UsageError(
            "cannot be continued: part of it has no identity, so that other work might be taken for the same",
            path=place.name, found=identity.obstacle, remedy="run without --resume to begin anew",
        )  # fmt: skip
    if resume and not overwrite and place.is_published(identity.value):
        return _report(plan, place, 0, started, plan.nbytes)
    place.begin(plan, identity.value, share=None, resume=resume)
    return _carry_out(plan, cut_all(plan.files), place, identity, count, memory, progress, started)


def run_share(
    plan: Plan,
    destination: str | Destination,
    share: Share,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    source_paths: Sequence[str] = (),
) -> ShareReport:
    """Write one share of a plan, which other processes make, too, and whose other shares they write.

    What a process of the same plan left is continued.  Nothing is published: see ``finish``.

    Args:
        plan: the same in every process.
        destination: as for ``execute``; every process must reach it.
        share: which part of the work this process does.
        overwrite, workers, memory, progress, source_paths: as for ``execute``.

    Raises:
        OutputError: the destination exists, other processes write another plan there or divide it otherwise, another
            one does this share, or the disk is full.
        FormatError: a source turns out to be damaged.
        UsageError: ``memory`` is too small for one thread, or something in the plan has no identity.
    """
    started = time.monotonic()
    place = _place(destination, overwrite)
    count = worker_count(workers, memory, plan)
    identity = _shared_identity(plan, place, source_paths)
    cut = cut_all(plan.files)
    division = Division(plan, cut, share.of, place)
    blocks = list(division.blocks(share))
    total = sum(block.nbytes for block in blocks)
    if place.is_published(identity.value):
        return ShareReport(share, 0, total, time.monotonic() - started, total)
    place.begin(plan, identity.value, share=share, resume=True)
    try:
        known = place.records(identity.value)
        run = Run(
            plan, cut, place, known, workers=count, memory=memory, progress=progress, total=total, ends=division.ends
        )  # fmt: skip
        run.write(blocks)
        run.sync()
    except OSError as error:
        place.close(failure=str(error))
        raise write_error(place.name, error) from error
    except BaseException as error:
        place.close(failure=str(error) or type(error).__name__)
        raise
    place.close()
    return ShareReport(share, run.reads.nbytes, total, time.monotonic() - started, run.resumed_bytes)


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
    """Write what the shares of a plan leave, and publish it, when all of them are there.

    It may be called by any process, also by several: the others find it done.

    Args:
        plan: the same in every process.
        destination: as for ``execute``.
        of: number of shares.
        wait: seconds to wait for shares that are not whole.
        overwrite, workers, memory, source_paths: as for ``execute``.

    Raises:
        OutputError: shares are not whole in time, each named with what is known of it, or the disk is full.
        UsageError: ``memory`` is too small for one thread, or something in the plan has no identity.
    """
    started = time.monotonic()
    place = _place(destination, overwrite)
    count = worker_count(workers, memory, plan)
    identity = _shared_identity(plan, place, source_paths)
    cut = cut_all(plan.files)
    division = Division(plan, cut, of, place)
    while True:
        late = time.monotonic() - started >= wait
        if place.is_published(identity.value):
            return _report(plan, place, 0, started, plan.nbytes)
        missing = division.missing(place.records(identity.value))
        if not missing:
            try:
                place.begin(plan, identity.value, share=None, resume=True)
            except BusyError:
                if late:
                    raise
            else:
                return _carry_out(plan, cut, place, identity, count, memory, None, started, shared=True)
        elif late:
            raise _unfinished(place, missing)
        time.sleep(_POLL_SECONDS)


def _unfinished(place: Destination, missing: dict[Share, int]) -> OutputError:
    troubles = place.troubles()
    told = [
        f"share {share} ({troubles.get(share, 'not begun, or still at work')}; {nbytes:,} bytes)"
        for share, nbytes in list(missing.items())[:_SHOWN]
    ]
    more = len(missing) - len(told)
    return OutputError(
        "cannot be finished, because not all of it is written",
        path=place.name,
        found="missing: " + ", ".join(told) + (f" and {more} more" if more else ""),
        remedy="run the processes of these shares again; they go on from what is there",
    )


def _place(destination: str | Destination, overwrite: bool) -> Destination:
    return StagingDirectory(destination, overwrite=overwrite) if isinstance(destination, str) else destination


def _shared_identity(plan: Plan, place: Destination, source_paths: Sequence[str]) -> Fingerprint:
    found = fingerprint(plan, source_paths)
    if found.obstacle is None:
        return found
    raise UsageError(
        "cannot be divided between processes: part of it has no identity, so that they cannot tell it is the same work",
        path=place.name, found=found.obstacle, remedy="write it with one process",
    )  # fmt: skip


def _carry_out(
    plan: Plan,
    cut: Cut,
    place: Destination,
    identity: Fingerprint,
    workers: int,
    memory: int,
    progress: Progress | None,
    started: float,
    *,
    shared: bool = False,
) -> Report:
    """Write what is not there yet and publish the output; the destination has begun."""
    resumable = identity.obstacle is None
    known = place.records(identity.value)
    run = Run(plan, cut, place, known, workers=workers, memory=memory, progress=progress, total=plan.nbytes)
    try:
        entries = []
        for stage in sorted({file.stage for file in plan.files}):
            numbers = [number for number, file in enumerate(plan.files) if file.stage == stage]
            run.write(of_files(cut, numbers))
            entries += run.finish(numbers)
        order = {file.path: number for number, file in enumerate(plan.files)}
        entries.sort(key=lambda entry: (order[entry.file], entry.offset))
        sizes = {file.path: file.nbytes for file in plan.files}
        place.publish(Manifest(plan.format, identity.value, sizes, tuple(entries), plan.notes).to_bytes())
    except OutputError:
        place.close() if resumable and run.records else place.discard()
        raise
    except OSError as error:
        place.close() if resumable and run.records else place.discard()
        raise write_error(place.name, error) from error
    except AnyckptError:
        place.close() if shared else place.discard()
        raise
    except BaseException:
        place.close() if resumable else place.discard()
        raise
    return _report(plan, place, run.reads.nbytes, started, run.resumed_bytes)


def _report(plan: Plan, place: Destination, bytes_read: int, started: float, resumed_bytes: int) -> Report:
    return Report(
        output=place.name,
        format=plan.format,
        tensors=len({part.name for part in plan.tensors()}),
        bytes_read=bytes_read,
        bytes_written=plan.nbytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_bytes=resumed_bytes,
    )


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had.

    Linux tells it of the program; ``getrusage`` would count what the process that started it held at that moment.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
