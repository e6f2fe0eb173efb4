"""Saving again and again while a model trains: the loop waits for a copy of the state, another process writes it."""

from __future__ import annotations

import operator
import os
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import BusyError
from anyckpt.errors import OutputError, UsageError
from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_folder import latest, read_note
from anyckpt.operations.run_upkeep import clean, delete
from anyckpt.operations.steps.unfinished import is_in_store
from anyckpt.operations.writer_process import Upkeep
from anyckpt.storage.location import root_of
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.copying import PageLockedMemory, copy
from anyckpt.torch.describing import described
from anyckpt.torch.flights import Flights
from anyckpt.torch.options import Options
from anyckpt.torch.planned_before import Plans
from anyckpt.torch.saving import Prepared, asked, prepare

_TRIES = 20
_TRY_SECONDS = 1.0


@dataclass(frozen=True)
class _Record:
    """What a rank says of the save that it wants to begin."""

    step: int
    metric: float | None
    time: float


class Saver:
    """Saves a training job's state into one folder, a checkpoint for each step, without stalling the loop.

    Every rank makes one, and calls ``save``, ``wait``, ``close`` and ``latest`` as it calls collectives: all ranks, in
    the same order.  What it guarantees:

    - ``save`` returns when this rank's part of the state is copied, and the state may change.  Before that it waits:
      while ``in_flight`` earlier saves are not done, for the oldest; for all ranks to agree on the plan; the first
      time that so many are under way, and when the state has grown, for the system to give the memory. With
      ``assume_constant_structure`` the plan of the save before is used again if every rank has the same boxes of the
      same tensors and its objects take as much room; whether objects are alike on all ranks is then looked at only when
      a plan is made.
    - Each rank's part is written by a process of its own, which imports no torch and sees no accelerator.
    - A checkpoint has its name when every rank's part of it is durable, and is whole; until then it does not exist.
      The process that is ready last publishes it, without asking any trainer, makes the link ``latest`` lead to the
      newest one, and deletes what no rule of ``keep`` keeps.
    - A save that failed on any rank raises its error, with the cause, on every rank, at the first ``save``, ``wait`` or
      ``close`` at which all ranks are done with it; what was there before is untouched.  That ``save`` has not begun,
      and may be tried again.
    - If a trainer is killed, its writer ends within seconds, and saves that were not published do not come; the others
      learn of it as of any rank that is gone.  If a writer is killed, the saves that it had failed, and the next one
      starts another.  Nothing of this leaves half a checkpoint, a process or shared memory behind; hidden files that
      are left are removed when the next ``Saver`` is made for the folder.
    - A program that ends without ``close`` waits for its own writer; one that is ended by a signal does not.

    Memory: on each rank a copy of its part of the state for each save in flight, shared and page-locked if CUDA is in
    use, kept until ``close``; and in the writer blocks of at most 96 MiB.

    Args:
        folder: where checkpoints are kept; made if it is not there.  In an object store (``s3://``, ``gs://``,
            ``az://``), too: there an earlier save of the same step is deleted before another one begins, and a
            writer of another machine counts as gone after 45 seconds of silence.
        options: as for ``save``; or its fields as keywords, ``overwrite`` and ``assume_constant_structure`` being true
            if they are not given.
        name: of a checkpoint, with ``{step}``; ``iter_{step:07d}`` is Megatron's, which then finds the newest.
        keep: which checkpoints stay; all if None.  Only what was saved by a ``Saver`` is deleted.
        in_flight: so many saves may be under way.
        pointer: whether there is a link ``latest``; an object store has none.
        group: the ranks that save together; all if None.

    Raises:
        OutputError: the folder cannot be made or cleaned up, or the process that writes cannot be started.
        UsageError: an option is not possible.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        options: Options | None = None,
        *,
        name: str = "step-{step}",
        keep: Retention | None = None,
        in_flight: int = 2,
        pointer: bool = True,
        group: Any = None,
        **settings: Any,
    ) -> None:
        if not isinstance(in_flight, int) or in_flight < 1:
            raise UsageError("no save may be in flight", expected="in_flight of at least 1", found=in_flight)
        if _named(name, 1) == _named(name, 2):
            raise UsageError("the name of a checkpoint does not tell its step", expected="{step} in it", found=name)
        self.folder = root_of(os.fspath(folder))
        usual = {"overwrite": True, "assume_constant_structure": True} if options is None else {}
        self._options = asked(options, {**usual, **settings})
        self._plans: Plans = {}
        self._name = name
        self._keep = Retention(last=None) if keep is None else keep
        self._in_flight = in_flight
        self._pointer = pointer
        self._ranks = Ranks(group, timeout=self._options.timeout)
        self._ranks.broadcast(self._open, what="to open a folder for saving")
        self._writer = self._ranks.together(lambda: BackgroundWriter(memory=PageLockedMemory, copy=copy))
        self._flights = Flights(self._ranks, self._writer)
        self._finalizer = weakref.finalize(self, self._writer.close)

    @property
    def pending(self) -> tuple[str, ...]:
        """Paths of the saves of which this rank does not know yet how they went."""
        return self._flights.paths

    def save(self, state: Mapping[str, Any], step: int, metric: float | None = None) -> str:
        """Save live state; collective.

        Args:
            state: as for ``anyckpt.torch.save``; may change when the call returns.
            step: optimizer steps taken, the same on all ranks.
            metric: how good the model is, for ``keep``; rank 0's counts.

        Returns:
            the path where the checkpoint will be.

        Raises:
            OutputError: an earlier save failed, and this one is not begun.
            MappingError: ranks do not agree, or elements are missing or there twice.
            RankError: another rank failed otherwise, or did not come.
            UsageError: the state is not possible, ``step`` or ``metric`` is no number, or the saver is closed.
        """
        self._check_open()
        step, metric = _number(step), None if metric is None else _real(metric)
        if len(self._flights) >= self._in_flight:
            self._flights.wait(1)
        said = self._flights.meet(lambda: _Record(step, metric, time.time()))
        if any(record.step != step for record in said):
            raise UsageError(
                "ranks save different steps", expected="the same step on all", found=[record.step for record in said]
            )
        path = os.path.join(self.folder, _named(self._name, step))
        saved = Saved(os.path.basename(path), step, said[0].time, said[0].metric)
        if is_in_store(path) and self._options.overwrite:
            self._ranks.broadcast(lambda: _make_way(path), what="to remove an earlier save of a step")
        prepared = self._prepared(state, path)
        self._flights.begin(prepared, path, self._options, Upkeep(saved, self._keep, self._pointer))
        return path

    def wait(self) -> None:
        """Wait until every save is published, or has failed; collective.

        Raises:
            OutputError: one failed.
            RankError: another rank did not come.
        """
        self._check_open()
        self._flights.wait()
        self._flights.meet(lambda: None)

    def latest(self) -> str | None:
        """The newest whole checkpoint in the folder, the same on every rank (``anyckpt.torch.latest``); collective."""
        found: str | None = self._ranks.broadcast(lambda: latest(self.folder), what="to look for a checkpoint")
        return found

    def close(self) -> None:
        """Wait for what is under way, end the process that writes, and give the memory back; collective.

        Raises:
            OutputError: a save failed.
            RankError: another rank did not come.
        """
        if not self._finalizer.alive:
            return
        try:
            self.wait()
        finally:
            self._plans.clear()
            self._finalizer()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error only this rank's part, for the others may not come."""
        if error is None:
            self.close()
        else:
            self._finalizer()

    def _prepared(self, state: Mapping[str, Any], path: str) -> Prepared:
        """The plan, when the writer of a job that was killed a moment ago is gone: its last write may take long."""
        for left in range(_TRIES, 0, -1):
            try:
                return prepare(lambda: described(state, self._options), path, self._options, self._ranks, self._plans)
            except BusyError:  # on every rank, as whatever fails in planning
                if left == 1:
                    raise
                time.sleep(_TRY_SECONDS)
        raise AssertionError

    def _open(self) -> None:
        if self._ranks.rank == 0:
            try:
                if not is_in_store(self.folder):
                    os.makedirs(self.folder, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot be made: {error.strerror}", path=self.folder) from error
            clean(self.folder)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UsageError("the saver is closed", path=self.folder, remedy="make another one")


def _make_way(path: str) -> None:
    """Delete what a ``Saver`` saved of the same step, since ranks together replace nothing in an object store."""
    if read_note(path) is not None:
        delete(path)


def _number(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise UsageError("a step is no whole number", expected="optimizer steps taken", found=repr(step)) from error


def _real(metric: Any) -> float:
    try:
        return float(metric)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError("a metric is no number", expected="one number", found=repr(metric)[:80]) from error


def _named(name: str, step: int) -> str:
    try:
        made = name.format(step=step)
    except (AttributeError, LookupError, ValueError) as error:
        raise UsageError("is no name for checkpoints", expected="text with {step} in it", found=repr(name)) from error
    if os.path.basename(made) != made or made.startswith("."):
        raise UsageError(
            "is no name for checkpoints",
            expected="one in the folder, not hidden, so that the newest is found",
            found=repr(name),
        )
    return made
