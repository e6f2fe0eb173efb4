"""Writing what was planned: by this process, or its share of it by this one among several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.execute import Report, execute, peak_rss_bytes
from anyckpt.engine.launchers import launched_share
from anyckpt.engine.plan import Plan
from anyckpt.engine.run import Progress, worker_count
from anyckpt.engine.shared_run import SharedRun
from anyckpt.engine.staging import is_begun as has_begun
from anyckpt.errors import UsageError
from anyckpt.storage.place import scheme_of


@dataclass(frozen=True)
class Target:
    """An output that is on no disk.

    Attributes:
        path: where it goes.
        overwrite: a checkpoint that is there may be replaced.
        said: what is said of it where others may see it.
    """

    path: str
    overwrite: bool
    said: Said


@dataclass(frozen=True)
class Said:
    """What is said of an output where others may see it.

    Attributes:
        private: others are not to see it.
        message: of the commit, where it is one.
        card: a text about it, from the sizes and SHA-256 of its files.
    """

    private: bool = False
    message: str | None = None
    card: Callable[[Mapping[str, tuple[int, str]]], str] | None = None


NOTHING_SAID = Said()


def _on_the_hub(target: Target) -> Destination:
    from anyckpt.engine.hub_destination import HubDestination  # here, so that outputs on disks do not need it

    said = target.said
    return HubDestination(
        target.path, overwrite=target.overwrite, private=said.private, message=said.message, card=said.card
    )


def _in_a_store(target: Target) -> Destination:
    from anyckpt.engine.object_destination import ObjectDestination
    from anyckpt.storage.remote.objects import objects_at

    said = target.said
    if said.private or said.message is not None:
        raise UsageError(_FOR_THE_HUB, path=target.path, expected="hf://org/name")
    objects, key = objects_at(target.path)
    return ObjectDestination(objects, key, overwrite=target.overwrite)


_FOR_THE_HUB = "--private and --commit-message are for the Hub"
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
"""Schemes of paths in object stores, which are written as files are."""

DESTINATIONS: dict[str, Callable[[Target], Destination]] = {
    "hf": _on_the_hub,
    **dict.fromkeys(OBJECT_STORES, _in_a_store),
}
"""What writes an output whose path begins with ``scheme://``; all others are on disks."""


def destination_at(path: str, *, overwrite: bool, said: Said) -> str | Destination:
    """What writes to a path; the path itself if it is on a disk.

    Raises:
        UsageError: something is asked for that means nothing there.
    """
    scheme = scheme_of(path)
    if scheme in DESTINATIONS:
        return DESTINATIONS[scheme](Target(path, overwrite, said))
    if said.private or said.message is not None:
        raise UsageError(_FOR_THE_HUB, path=path, expected="hf://org/name")
    return path


def is_begun(path: str) -> bool:
    """Whether interrupted work on an output has left what going on with it would not write again."""
    place = destination_at(path, overwrite=True, said=NOTHING_SAID)
    return has_begun(path) if isinstance(place, str) else place.is_begun()


AUTO = "auto"
RAY = "ray"
_PATIENCE_SECONDS = 600.0


def parse_share(text: str | None, environment: Mapping[str, str] = os.environ) -> Share | None:
    """``I/N``: the I-th of N processes that do one piece of work together; ``auto``: which one the environment says.

    Args:
        text: what was asked for.
        environment: variables by which launchers tell each process its rank.

    Raises:
        UsageError: it is something else.
    """
    if text is None:
        return None
    if text == AUTO:
        return launched_share(environment)
    number, slash, of = text.partition("/")
    if not (slash and number.isascii() and number.isdecimal() and of.isascii() and of.isdecimal()):
        raise UsageError("--share is not I/N", expected="such as 1/4, the first of four processes, or auto", found=text)
    return Share(int(number), int(of))


def patience(text: str | None, share: Share | None, wait: float | None) -> float:
    """Seconds for which this process waits for a sign of the others, when it has done its share.

    The first share's waits: so long as is said, or where a launcher has started all of them, ten minutes.  Without a
    launcher they may be run one after another, so that nobody waits unasked.

    Args:
        text: of ``--share``.
        share: what it comes to.
        wait: what was asked for.

    Raises:
        UsageError: there is nothing to wait for, or it is less than nothing.
    """
    if wait is not None and share is None:
        raise UsageError("--wait is for the other processes of --share", remedy="leave it out, or give --share")
    if wait is not None and not 0 <= wait < float("inf"):
        raise UsageError("--wait is no time", expected="seconds, 0 or more", found=wait)
    if share is None or share.number != 1:
        return 0.0
    return wait if wait is not None else _PATIENCE_SECONDS if text == AUTO and share.of > 1 else 0.0


def write(
    plan: Plan,
    output: str,
    *,
    share: Share | None,
    wait: float = 0.0,
    engine: str | None = None,
    gzip: bool = False,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    memory: int,
    progress: Progress | None,
    source_paths: Sequence[str],
    said: Said = NOTHING_SAID,
) -> dict[str, Any]:
    """Write a plan, or one share of it; the process that finds all shares written publishes the output.

    Args:
        share: which share; None if this is the only process.
        wait: with a share, seconds to wait for a sign of the others.
        engine: ``ray``: by the nodes of a Ray cluster; with no share.
        gzip: compress the output, a single file on a disk, while it is written; with no share.
        said: what is said of it where others may see it.
        plan, output, overwrite, resume, workers, memory, progress, source_paths: as for ``execute``.

    Returns:
        the fields of a report; with a share also ``share`` and ``missing_shares``.

    Raises:
        AnyckptError: as for ``execute`` and ``SharedRun``.
    """
    place = destination_at(output, overwrite=overwrite, said=said)
    if gzip:
        if isinstance(place, Destination):
            raise UsageError("is compressed by gzip on a disk only", path=output, remedy="write it to a disk")
        place = _compressed(output, overwrite, worker_count(workers, memory, plan))
    if engine is not None:
        report = _on_a_cluster(engine)(
            plan,
            place,
            partial(destination_at, output, overwrite=overwrite, said=NOTHING_SAID),
            overwrite=overwrite,
            workers=workers,
            memory=memory,
            progress=progress,
            source_paths=source_paths,
        )
    elif share is None:
        report = execute(
            plan,
            place,
            overwrite=overwrite,
            resume=resume,
            workers=workers,
            memory=memory,
            progress=progress,
            source_paths=source_paths,
        )
    if share is None:
        return {name: value for name, value in asdict(report).items() if name != "published"}
    run = SharedRun(
        plan, place, share.of, overwrite=overwrite, workers=workers, memory=memory, source_paths=source_paths
    )
    part = run.write(share, progress)
    missing = run.missing()
    seconds = part.seconds
    if wait:
        seconds += run.finish(wait).seconds
        missing = {}
    elif not missing:
        with suppress(BusyError):  # another process that found all shares there publishes it
            seconds += run.finish().seconds
    return {
        "output": output,
        "format": plan.format,
        "tensors": len({piece.name for piece in plan.tensors()}),
        "bytes_read": part.bytes_read,
        "bytes_written": part.bytes_written,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "resumed_bytes": part.resumed_bytes,
        "notes": run.notes(),
        "share": f"{share.number}/{share.of}",
        "missing_shares": tuple(f"{one.number}/{one.of}" for one in missing),
    }


def _on_a_cluster(engine: str) -> Callable[..., Report]:
    if engine != RAY:
        raise UsageError("there is no such engine", expected=RAY, found=engine)
    from anyckpt.engine.ray_engine import write_on_ray

    return write_on_ray


def _compressed(output: str, overwrite: bool, threads: int) -> Destination:
    from anyckpt.engine.gzip_file import GzipFile

    return GzipFile(output, overwrite=overwrite, threads=threads)
