"""Looking at something by the nodes of a Ray cluster, for the process that answers.

Units travel to tasks, and what was found there comes back, so that the nodes need no folder in common: they see what is
read, under the same paths or in a bucket, and this process gives the answer as a single one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from anyckpt.engine.fingerprint import fingerprint_of
from anyckpt.engine.ray_engine import cluster, ended, size_of
from anyckpt.engine.share import divided
from anyckpt.errors import UsageError
from anyckpt.operations.steps.looking import Asked, Looking, Unit
from anyckpt.operations.steps.threads import Meter, Progress, each_of_tensors
from anyckpt.operations.steps.writing import RAY

_THREADS = 4  # as those that look at tensors in one process
_SHARES_FOR_EACH = 16  # progress is told when one is done, and little is lost with a node
_SMALLEST_SHARE = 64 << 20
_UNIT_COST = 16 << 10


class RayLooking(Looking):
    """The work of a cluster.

    Args:
        asked: the engine, and threads of a task.
        progress: of all of the work.

    Raises:
        UsageError: there is no such engine, or it is asked for with shares.
    """

    def __init__(self, asked: Asked, progress: Progress | None) -> None:
        if asked.engine != RAY:
            raise UsageError("there is no such engine", expected=RAY, found=asked.engine)
        for name, value in (("--share", asked.share), ("--wait", asked.wait), ("--records", asked.records)):
            if value is not None:
                raise UsageError(f"--engine {RAY} makes shares of its own", remedy=f"leave out {name}")
        self._workers, self._progress = asked.workers, progress

    def look(self, units: Callable[[], Iterable[Unit]]) -> Mapping[str, Any]:
        work = list(units())
        meter = Meter(sum(unit.nbytes for unit in work), self._progress)
        found: dict[str, Any] = {}
        if not work:
            return found
        with cluster() as ray:
            size = size_of(ray, self._workers, _THREADS)
            weights = [unit.nbytes + _UNIT_COST for unit in work]
            of = max(1, min(len(work), size.at_once * _SHARES_FOR_EACH, sum(weights) // _SMALLEST_SHARE))
            shares: dict[int, list[Unit]] = {}
            for unit, owner in zip(work, divided(weights, of), strict=True):
                shares.setdefault(owner, []).append(unit)
            own = list(shares.values())
            for done in ended(ray, _look_at, [(share, size.threads) for share in own], size.threads):
                for number, there in done:
                    found.update(there)
                    meter.advance(sum(unit.nbytes for unit in own[number]))
        return found


def _look_at(own: Sequence[Unit], threads: int) -> dict[str, Any]:
    """What a task does: look at what the driver opened, which is what this node has under the same paths."""
    read = fingerprint_of((value for unit in own for value in (*unit.tensors, *unit.sources)), ())
    read.check_unchanged()
    meter = Meter(sum(unit.nbytes for unit in own), None)
    found = each_of_tensors(lambda unit, advance: unit.look(advance), own, lambda unit: unit.tensors, meter, threads)
    return {unit.key: what for unit, what in zip(own, found, strict=True)}
