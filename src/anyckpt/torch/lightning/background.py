"""A trainer's files written while it goes on, and removed when what replaces them is whole."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from anyckpt.errors import AnyckptError, OutputError, UsageError
from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.operations.run_upkeep import delete
from anyckpt.operations.writer_process import Upkeep
from anyckpt.torch.copying import PageLockedMemory, copy
from anyckpt.torch.one_file import check_no_folder
from anyckpt.torch.trainer_state import trainer_plan


class Background:
    """Saves and removals in the order in which they were asked for.

    Args:
        in_flight: so many saves may be under way; 0 if none ever is.

    Raises:
        UsageError: it is negative.
    """

    def __init__(self, in_flight: int) -> None:
        if in_flight < 0:
            raise UsageError("so many saves cannot be under way", expected="in_flight of 0 or more", found=in_flight)
        self.in_flight = in_flight
        self._writer: BackgroundWriter | None = None
        self._end: weakref.finalize[..., Background] | None = None
        self._saves: list[tuple[int, str]] = []
        self._removals: list[tuple[int, str]] = []

    @property
    def pending(self) -> tuple[str, ...]:
        """Paths of the saves that are under way."""
        return tuple(path for _, path in self._saves)

    def save(self, state: Mapping[str, Any], path: str | os.PathLike[str], upkeep: Upkeep | None = None) -> None:
        """Copy a state and have it written.

        Args:
            state: as Lightning's trainer gives it; may change when this returns.
            path: the file.
            upkeep: what follows when it is whole.

        Raises:
            OutputError: an earlier save failed, and this one is not begun; or there is not enough memory.
            UsageError: an object cannot be pickled, or a tensor has no elements in memory.
        """
        self._settle(self.in_flight - 1)
        place = os.path.abspath(path)
        plan = trainer_plan(state, place)
        check_no_folder(place)
        if self._writer is None:
            self._writer = BackgroundWriter(memory=PageLockedMemory, copy=copy)
            self._end = weakref.finalize(self, self._writer.close)  # a program that ends by itself waits
        number = self._writer.submit(plan, place, overwrite=True, upkeep=upkeep)
        self._saves.append((number, place))
        self._removals = [removal for removal in self._removals if removal[1] != place]

    def remove(self, path: str) -> None:
        """Remove a checkpoint, now or when every save that is under way is whole; it stays if one of them fails."""
        if not self._saves:
            delete(path)
            return
        self._removals.append((self._saves[-1][0], path))
        with suppress(OutputError):  # told by the next save
            self._settle(len(self._saves), tell=False)

    def wait(self) -> None:
        """Wait for all saves.

        Raises:
            OutputError: one failed.
        """
        self._settle(0)

    def close(self) -> None:
        """Wait for all saves, and end the process that writes.

        Raises:
            OutputError: one failed.
        """
        try:
            self.wait()
        finally:
            self._writer = None
            if self._end is not None:
                self._end()

    def _settle(self, most: int, *, tell: bool = True) -> None:
        """Wait until no more than so many saves are under way, and remove what may go."""
        failure: AnyckptError | None = None
        while self._saves and self._writer is not None:
            number, _ = self._saves[0]
            outcome = self._writer.outcome(number, wait=None if len(self._saves) > most else 0.0)
            if outcome is None or (outcome.error is not None and not tell):
                break
            self._saves.pop(0)
            if outcome.error is not None:
                failure = failure or outcome.error
                self._removals = []  # what should have replaced them is not there
        under_way = min((number for number, _ in self._saves), default=None)
        going = [(number, path) for number, path in self._removals if under_way is None or number < under_way]
        self._removals = [removal for removal in self._removals if removal not in going]
        for _, path in going:
            delete(path)
        if failure is not None:
            raise failure
