"""Directories that all ranks save while a trainer goes on, each its own part, and what goes when they are whole."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anyckpt.engine.plan import OutputFile, Part, TensorData
from anyckpt.errors import AnyckptError
from anyckpt.formats.lightning.keys import META
from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.operations.run_upkeep import delete
from anyckpt.operations.writer_process import Upkeep
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.copying import PageLockedMemory, copy
from anyckpt.torch.describing import described
from anyckpt.torch.flights import Flights
from anyckpt.torch.options import Options
from anyckpt.torch.saving import prepare
from anyckpt.torch.trainer_state import trainer_plan

_OPTIONS = Options(format="dcp", overwrite=True, check_objects=False)


class SavesTogether:
    """Saves of sharded directories that are under way; making one, and all but ``pending``, is collective.

    Args:
        in_flight: so many may be.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._ranks = Ranks()
        self._writer = self._ranks.together(lambda: BackgroundWriter(memory=PageLockedMemory, copy=copy))
        self._flights = Flights(self._ranks, self._writer)
        self._removals: list[tuple[str, str]] = []
        self._end = weakref.finalize(self, self._writer.close)  # a program that ends by itself waits

    @property
    def pending(self) -> tuple[str, ...]:
        """Paths of the saves of which this rank does not know yet how they went."""
        return self._flights.paths

    def save(self, state: Mapping[str, Any], rest: Mapping[str, Any], path: str, upkeep: Upkeep | None) -> None:
        """Copy this rank's part of a state and have it written.

        Args:
            state: weights and optimizers by torch's names, each rank's part; may change when this returns.
            rest: rank 0's trainer's state besides, for ``meta.pt``.
            path: the directory, the same on all ranks; what is there is replaced at the end.
            upkeep: of rank 0: what follows when it is whole.

        Raises:
            AnyckptError: on every rank: an earlier save failed, and this one is not begun; or it is not possible.
        """
        if len(self._flights) >= self._in_flight:
            self._flights.wait(1)
        said = self._meet(upkeep)
        prepared = prepare(
            lambda: described(state), path, _OPTIONS, self._ranks, beside=lambda key: self._meta(rest, path, key)
        )
        self._flights.begin(prepared, path, _OPTIONS, said[0])

    def remove(self, path: str) -> None:
        """Remove a checkpoint when the saves that are under way are whole; it stays if one fails.  Not collective."""
        if self.pending:
            self._removals.append((self.pending[-1], path))
        else:
            delete(path)

    def wait(self) -> None:
        """Wait for all saves.

        Raises:
            OutputError: one failed.
        """
        if self.pending:
            self._flights.wait()
            self._meet(None)

    def close(self, *, alone: bool = False) -> None:
        """Wait, and end the process that writes.

        Args:
            alone: wait for this rank's own part only: the others may not come.

        Raises:
            OutputError: a save failed.
        """
        try:
            if not alone:
                self.wait()
        finally:
            self._end()

    def _meet(self, upkeep: Upkeep | None) -> list[Upkeep | None]:
        """Learn how saves went, and remove what may go now."""
        try:
            return self._flights.meet(lambda: upkeep)
        except AnyckptError:
            self._removals = []  # what should have replaced them is not there
            raise
        finally:
            waiting = self.pending
            going = [path for after, path in self._removals if after not in waiting]
            self._removals = [removal for removal in self._removals if removal[0] in waiting]
            for path in going:
                delete(path)

    def _meta(self, rest: Mapping[str, Any], path: str, key: str) -> tuple[OutputFile]:
        """``meta.pt`` as all ranks plan it; rank 0 has its bytes."""
        own: list[tuple[Part, ...]] = []

        def planned() -> tuple[Part, ...]:
            parts = trainer_plan(rest, path).files[0].parts
            own.append(_owned(parts, key, with_bytes=True))
            return _owned(parts, key, with_bytes=False)

        told = self._ranks.broadcast(planned, what="to plan a checkpoint")
        return (OutputFile(META, own[0] if own else told),)


def _owned(parts: Sequence[Part], key: str, *, with_bytes: bool) -> tuple[Part, ...]:
    """Parts whose tensors are rank 0's."""
    return tuple(
        replace(part, tensor=_of_first(part.tensor, (key, META, number), part.name, with_bytes))
        if isinstance(part, TensorData)
        else part
        for number, part in enumerate(parts)
    )


def _of_first(tensor: LazyTensor, key: tuple[Any, ...], name: str, with_bytes: bool) -> LazyTensor:
    source = None
    if with_bytes:
        elements = np.empty(tensor.size, dtype=tensor.dtype.raw)
        tensor.fill(0, elements)
        source = MemorySource(elements)
    return Stored(OwnedSource(1, key, tensor.nbytes, source, name), 0, tensor.dtype, tensor.shape)
