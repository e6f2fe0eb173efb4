"""One save in the background, where a ``Saver`` would be too much: what ``dcp.async_save`` is to ``dcp.save``."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from typing import Any

from anyckpt.operations.background_writer import BackgroundWriter
from anyckpt.storage.location import root_of
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.copying import PageLockedMemory, copy
from anyckpt.torch.flights import Flights
from anyckpt.torch.options import Options
from anyckpt.torch.saving import Prepared, save

_writers: dict[int, BackgroundWriter] = {}
"""By the process that has it: a fork has none."""


class SaveHandle:
    """A save that is under way.

    Attributes:
        path: where the checkpoint will be; it is there when it is whole.
    """

    def __init__(self, path: str, flights: Flights) -> None:
        self.path = path
        self._flights = flights

    def done(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        return self._flights.are_done()

    def wait(self) -> str:
        """Wait until the checkpoint is there, and give its path; collective, and again if one likes.

        Raises:
            OutputError: it failed on some rank; every rank raises it, once.
            RankError: another rank did not come.
        """
        self._flights.wait()
        self._flights.meet(lambda: None)
        return self.path


def async_save(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    group: Any = None,
    **settings: Any,
) -> SaveHandle:
    """Save as ``save`` does, and return when this rank's part of the state is copied; every rank calls it.

    A process that all such saves of this one share writes them in turn, and ends with it.  A save that is under way
    takes memory for a copy of this rank's part of the state, which a later one uses again.  What is certain of a
    ``Saver``'s saves is so of these, but that errors are raised by the handle's ``wait``: a save for which nobody waits
    may fail unheard.

    Args:
        state: as for ``save``; may change when the call returns.
        path: the checkpoint, which every rank reaches.
        options: see ``Options``; its fields may be given as keywords instead.
        group: the ranks that save together; all if None.

    Raises:
        MappingError: ranks do not agree, or elements are missing or there twice; every rank raises it.
        OutputError: the destination exists, or the process that writes cannot be started.
        RankError: another rank failed otherwise, or did not come.
        UsageError: the state or an option is not possible.
    """
    report = save(state, path, options, group=group, **{**settings, "asynchronous": True})
    assert report.handle is not None
    return report.handle


def begun(prepared: Prepared, path: str | os.PathLike[str], options: Options, ranks: Ranks) -> SaveHandle:
    """A save that is planned, given to the process that writes; collective.

    Raises:
        OutputError: that process cannot be started on some rank.
    """
    destination = root_of(os.fspath(path))
    flights = Flights(ranks, ranks.together(_writer))
    flights.begin(prepared, destination, options)
    return SaveHandle(destination, flights)


def _writer() -> BackgroundWriter:
    pid = os.getpid()
    if pid not in _writers:
        _writers.clear()
        _writers[pid] = BackgroundWriter(memory=PageLockedMemory, copy=copy)
        atexit.register(_writers[pid].close)
    return _writers[pid]
