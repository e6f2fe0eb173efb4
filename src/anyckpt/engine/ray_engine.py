"""The shares of one plan as tasks of a Ray cluster.

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

from anyckpt.engine.destination import BusyError, Destination, Share
from anyckpt.engine.execute import Report
from anyckpt.engine.plan import Plan
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
    with _cluster() as ray:
        threads, at_once = _size(ray, workers)
        of = max(1, min(at_once * _SHARES_FOR_EACH, plan.nbytes // _SMALLEST_SHARE))
        how: dict[str, Any] = {"overwrite": overwrite, "workers": threads, "memory": memory}
        run = SharedRun(plan, place, of, source_paths=source_paths, **how)
        task = ray.remote(_write_share).options(
            num_cpus=threads, max_retries=_RETRIES, scheduling_strategy="SPREAD", name="anyckpt share"
        )
        travelling = ray.put(plan)
        left = [task.remote(travelling, place_at, Share(n, of), list(source_paths), how) for n in range(1, of + 1)]
        try:
            while left:
                done, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_SECONDS)
                _take(ray, done)
                if progress is not None:
                    progress(max(0, plan.nbytes - sum(run.missing().values())), plan.nbytes)
        except BaseException:
            for one in left:
                ray.cancel(one, force=True)
            raise
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


def _take(ray: Any, done: Sequence[Any]) -> None:
    """Raise what went wrong in tasks that ended, as it was raised there."""
    try:
        ray.get(list(done))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, AnyckptError) else error) from None
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"nodes of the cluster were lost more than {_RETRIES} times",
            found=type(error).__name__,
            remedy="run the same command again, which goes on from what is there",
        ) from error


def _size(ray: Any, workers: int | None) -> tuple[int, int]:
    """Threads of a task, and how many tasks the cluster runs at once."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    there = [count for count in nodes if count]
    if not there:
        raise UsageError("the Ray cluster has no processors")
    threads = workers or min(_THREADS, min(there))
    at_once = sum(count // threads for count in there)
    if not at_once:
        raise UsageError(
            "no node of the Ray cluster has so many processors",
            expected=f"--workers up to {max(there)}",
            found=threads,
        )
    return threads, at_once


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected to a cluster; one that is there already stays as it is."""
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
