"""The shares of one plan as tasks of a Ray cluster, and how any work is given to one.

The plan travels once; each task writes one share, as a process of its own would (``shared_run``).  When a node is lost,
Ray runs its tasks again on another one, which go on from the blocks that are durable; all nodes see the destination.
What is done is read from the records there, so that no node reports anything and none is missed for that.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.execute import Report
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import own_version
from anyckpt.engine.run import Progress
from anyckpt.engine.shared_run import SharedRun
from anyckpt.errors import AnyckptError, OutputError, UsageError

_THREADS = 8
_SHARES_FOR_EACH = 4  # so that a node that is lost takes little with it, and none waits long for the last
_SMALLEST_SHARE = 64 << 20
_RETRIES = 10
_LOOK_SECONDS = 1.0
_BUSY_SECONDS = 60.0


def write_on_ray(
    plan: Plan,
    place: str | Destination,
    place_at: Callable[[], str | Destination],
    *,
    overwrite: bool,
    workers: int | None,
    memory: int,
    progress: Progress | None,
    source_paths: Sequence[str],
) -> Report:
    """Write a plan by the nodes of a Ray cluster, and publish the output.

    The cluster is the one that ``RAY_ADDRESS`` names or that runs on this machine; if there is none, one is started
    here, and ended.

    Args:
        plan: what to write; it is pickled.
        place: where it is published.
        place_at: makes the same destination in each task; it is pickled.
        overwrite, memory, progress, source_paths: as for ``execute``.
        workers: threads of a task, which asks for as many processors; as many as the smallest node has, up to 8, if
            None.

    Raises:
        UsageError: Ray is not installed.
        OutputError: nodes were lost too often; the same command goes on from what is there.
        AnyckptError: as of ``SharedRun``.
    """
    with cluster() as ray:
        size = size_of(ray, workers, _THREADS)
        of = max(1, min(size.at_once * _SHARES_FOR_EACH, plan.nbytes // _SMALLEST_SHARE))
        how: dict[str, Any] = {"overwrite": overwrite, "workers": size.threads, "memory": memory}
        run = SharedRun(plan, place, of, source_paths=source_paths, **how)
        travelling = ray.put(plan)
        work = [(travelling, place_at, Share(number, of), list(source_paths), how) for number in range(1, of + 1)]
        for _ in ended(ray, _write_share, work, size.threads):
            if progress is not None:
                progress(max(0, plan.nbytes - sum(run.missing().values())), plan.nbytes)
        return run.finish()


def _write_share(
    plan: Plan,
    place_at: Callable[[], str | Destination],
    share: Share,
    source_paths: Sequence[str],
    how: dict[str, Any],
) -> None:
    """What a task does.  The process that had its share on a node that is lost may live on for a moment."""
    run = SharedRun(plan, place_at(), share.of, source_paths=source_paths, **how)
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            run.write(share)
            return
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(_LOOK_SECONDS)


def ended(
    ray: Any, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[list[tuple[int, Any]]]:
    """Do work by tasks, which are run again where a node is lost.

    Args:
        ray: of a ``cluster``.
        work: a function of a module that all nodes have.
        arguments: of each task.
        threads: that a task has.

    Yields:
        every moment the tasks that ended since then: which, and what came of it.

    Raises:
        UsageError: nodes have another version of anyckpt.
        OutputError: nodes were lost too often.
        AnyckptError: of the first task that failed.
    """
    task = ray.remote(_of_one_version).options(
        num_cpus=threads, max_retries=_RETRIES, scheduling_strategy="SPREAD", name="anyckpt share"
    )
    numbers = {task.remote(own_version(), work, *own): number for number, own in enumerate(arguments)}
    left = list(numbers)
    try:
        while left:
            done, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_SECONDS)
            yield list(zip((numbers[one] for one in done), _taken(ray, done), strict=True))
    except BaseException:
        for one in left:
            ray.cancel(one, force=True)
        raise


def _of_one_version(version: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a task does, on a node that has what the driver has."""
    if version != own_version():
        raise UsageError(
            "a node of the Ray cluster has another version of anyckpt",
            expected=version,
            found=own_version(),
            remedy="install the same version on all nodes",
        )
    return work(*arguments)


def _taken(ray: Any, done: Sequence[Any]) -> list[Any]:
    """What came of tasks that ended; what went wrong in them is raised as it was there."""
    try:
        return list(ray.get(list(done)))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, AnyckptError) else error) from None
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"nodes of the cluster were lost more than {_RETRIES} times",
            found=type(error).__name__,
            remedy="run the same command again; it goes on from what was written",
        ) from error


@dataclass(frozen=True)
class Size:
    """How much a cluster does at once.

    Attributes:
        threads: of a task.
        at_once: tasks.
    """

    threads: int
    at_once: int


def size_of(ray: Any, workers: int | None, most: int) -> Size:
    """How large tasks are, and how many the cluster runs at once.

    Args:
        ray: of a ``cluster``.
        workers: threads of a task; as many as the smallest node has, up to ``most``, if None.
        most: threads that a task has a use for.

    Raises:
        UsageError: no node has so many processors, or any.
    """
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    there = [count for count in nodes if count]
    if not there:
        raise UsageError("the Ray cluster has no processors")
    threads = workers or min(most, min(there))
    at_once = sum(count // threads for count in there)
    if not at_once:
        raise UsageError(
            "no node of the Ray cluster has so many processors",
            expected=f"--workers up to {max(there)}",
            found=threads,
        )
    return Size(threads, at_once)


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray, connected to a cluster; one that is there already stays as it is.

    Raises:
        UsageError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a cluster that is started here
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", remedy="pip install 'anyckpt[ray]'"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if ours:
            with suppress(Exception):
                ray.shutdown()
