"""Carrying out a plan: blocks read, computed and written by a few threads, then committed.

The bytes of the output do not depend on the number of threads, on the order of blocks, or on being interrupted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from anyckpt.data_classes import dataclass
from anyckpt.engine.blocks import Cut, cut_all
from anyckpt.engine.destination import Destination
from anyckpt.engine.files import write_error
from anyckpt.engine.fingerprint import Fingerprint, fingerprint
from anyckpt.engine.manifest import Manifest
from anyckpt.engine.plan import Plan
from anyckpt.engine.run import Progress, Run, of_files, worker_count
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import AnyckptError, OutputError, UnreachableError, UsageError

DEFAULT_MEMORY = 96 << 20
"""Bytes for blocks in flight; the interpreter and its libraries take some 50 MB besides."""


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
        published: whether this run gave the output its name; False where it was there, whole, by another one's doing.
        notes: what the place of the output could not give of what is promised elsewhere.
    """

    output: str
    format: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    resumed_bytes: int = 0
    published: bool = True
    notes: tuple[str, ...] = ()


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
    place = place_of(destination, overwrite)
    count = worker_count(workers, memory, plan, waits=place.in_order)
    identity = fingerprint(plan, source_paths)
    if resume and identity.obstacle is not None:
        raise UsageError(
            "cannot be continued: part of it has no identity, so that other work might be taken for the same",
            path=place.name,
            found=identity.obstacle,
            remedy="run without --resume to begin anew",
        )
    if resume and not overwrite and place.is_published(identity.value):
        return replace(report_of(plan, place, 0, started, plan.nbytes), published=False)
    cut = cut_all(plan.files, owned=identity.owned)
    place.begin(plan, identity.value, share=None, resume=resume)
    return carry_out(plan, cut, place, identity, count, memory, progress, started)


def place_of(destination: str | Destination, overwrite: bool) -> Destination:
    """The staging directory of a path; any other destination as it is."""
    return StagingDirectory(destination, overwrite=overwrite) if isinstance(destination, str) else destination


def carry_out(
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
    """Write what is not there yet and publish the output; the destination has begun.

    Args:
        plan, cut: what, and its blocks.
        place: where.
        identity: of the plan.
        workers, memory, progress: as for ``execute``.
        started: when the work began, for the report.
        shared: what is there is the work of other processes, too, and is kept whatever happens.

    Raises:
        AnyckptError: as for ``execute``.
    """
    resumable = identity.obstacle is None
    known = place.records(identity.value)
    total = plan.nbytes * place.passes
    run = Run(plan, cut, place, known, workers=workers, memory=memory, progress=progress, total=total)
    place.tell(run.advance, run.reads)
    try:
        entries = []
        for stage in sorted({file.stage for file in plan.files}):
            numbers = [number for number, file in enumerate(plan.files) if file.stage == stage]
            run.write(of_files(cut, numbers))
            entries += run.finish(numbers)
        order = {file.path: number for number, file in enumerate(plan.files)}
        entries.sort(key=lambda entry: (order[entry.file], entry.offset))
        sizes = {file.path: file.nbytes for file in plan.files}
        identity.check_unchanged()
        manifest = place.described(Manifest(plan.format, identity.value, sizes, tuple(entries), plan.notes))
        place.publish(manifest.to_bytes())
    except (OutputError, UnreachableError):  # another try may go on
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
    report = report_of(plan, place, run.reads.nbytes, started, run.resumed_bytes)
    return replace(report, bytes_written=sum(manifest.files.values()))


def report_of(plan: Plan, place: Destination, bytes_read: int, started: float, resumed_bytes: int) -> Report:
    """What was done since ``started``."""
    return Report(
        output=place.name,
        format=plan.format,
        tensors=len({part.name for part in plan.tensors()}),
        bytes_read=bytes_read,
        bytes_written=plan.nbytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_bytes=resumed_bytes,
        notes=place.weaker(),
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
