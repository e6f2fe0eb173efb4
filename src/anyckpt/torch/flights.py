"""Saves that are under way: another process writes each rank's part, and ranks learn together how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import Share
from anyckpt.errors import AnyckptError, OutputError
from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.operations.writer_process import Outcome, Upkeep
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.options import Options
from anyckpt.torch.saving import Prepared

T = TypeVar("T")


@dataclass
class Flight:
    """A save that is under way.

    Attributes:
        path: the checkpoint.
        number: of the writer's job; None if this rank could not hand it over.
        failure: why not.
    """

    path: str
    number: int | None = None
    failure: AnyckptError | None = None


@dataclass(frozen=True)
class _Status:
    """What a rank knows of a save: whether its part is done, and if so why it failed, and whether it published."""

    done: bool
    error: AnyckptError | None = None
    published: bool = False


class Flights:
    """The saves of some ranks, the oldest first.

    Args:
        ranks: who saves.
        writer: writes this rank's parts.
    """

    def __init__(self, ranks: Ranks, writer: BackgroundWriter) -> None:
        self._ranks = ranks
        self._writer = writer
        self._flights: list[Flight] = []

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def paths(self) -> tuple[str, ...]:
        """The checkpoints of which this rank does not know yet how they went."""
        return tuple(flight.path for flight in self._flights)

    def begin(self, prepared: Prepared, path: str, options: Options, upkeep: Upkeep | None = None) -> None:
        """Copy this rank's part of the state and have it written.

        If that fails here, other ranks have begun all the same: it is told when they meet.
        """
        flight = Flight(path)
        try:
            flight.number = self._writer.submit(
                prepared.plan,
                path,
                share=Share(self._ranks.rank + 1, self._ranks.size),
                key=prepared.key,
                overwrite=options.overwrite,
                workers=options.workers,
                upkeep=upkeep,
                kept=prepared.copies,
            )
        except AnyckptError as error:
            flight.failure = error
        except Exception as error:
            flight.failure = OutputError(
                "the state cannot be copied", path=path, found=f"{type(error).__name__}: {error}"
            )
        self._flights.append(flight)

    def are_done(self) -> bool:
        """Whether this rank's parts are."""
        return all(self._status(flight).done for flight in self._flights)

    def wait(self, count: int | None = None) -> None:
        """Wait for this rank's parts of so many of the oldest; of all if None."""
        for flight in self._flights[:count]:
            if flight.number is not None:
                self._writer.outcome(flight.number)

    def meet(self, tell: Callable[[], T]) -> list[T]:
        """Tell one another how saves went, and what each rank says besides; collective.

        Saves with which all ranks are done are under way no longer.

        Raises:
            AnyckptError: one of these failed; it is told once.
            RankError: another rank did not come.
        """
        found = self._ranks.gather(
            lambda: (tuple(self._status(flight) for flight in self._flights), tell()), "to learn how saves went"
        )
        failures = []
        for number, flight in enumerate(list(self._flights)):
            statuses = [rank[number] for rank, _ in found]
            if not all(status.done for status in statuses):
                continue
            self._flights.remove(flight)
            failed = next(((rank, one.error) for rank, one in enumerate(statuses) if one.error is not None), None)
            if failed is None and not any(status.published for status in statuses):
                failed = self._finished(flight)
            if failed is not None:
                failures.append(failed)
                if self._ranks.rank == 0:
                    self._writer.discard(flight.path)
        if failures:
            rank, error = failures[0]
            error.problem += f" (on rank {rank})" if self._ranks.size > 1 else ""
            error.problem += f"; {len(failures) - 1} more saves failed" if len(failures) > 1 else ""
            raise error
        return [said for _, said in found]

    def _finished(self, flight: Flight) -> tuple[int, AnyckptError] | None:
        """Publish what all ranks have written and nobody published; why that failed, if it did."""

        def finish() -> AnyckptError | None:
            return None if flight.number is None else self._writer.finish(flight.number).error

        error = self._ranks.broadcast(finish, what="to publish a checkpoint")
        return None if error is None else (0, error)

    def _status(self, flight: Flight) -> _Status:
        if flight.number is None:
            return _Status(True, flight.failure)
        outcome: Outcome | None = self._writer.outcome(flight.number, wait=0.0)
        return _Status(False) if outcome is None else _Status(True, outcome.error, outcome.published)
