"""Looking at something as one of several processes, which find one another in a folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from anyckpt.engine.destination import Share
from anyckpt.engine.fingerprint import fingerprint_of
from anyckpt.engine.look_records import LookRecords
from anyckpt.engine.records import own_version
from anyckpt.engine.share import divided
from anyckpt.engine.shared_run import Watch, beating, pausing
from anyckpt.errors import OutputError, UsageError
from anyckpt.operations.steps.looking import Asked, LookedAt, Looking, Unit
from anyckpt.operations.steps.threads import Advance, Meter, Progress, each_of_tensors
from anyckpt.operations.steps.writing import parse_share, patience
from anyckpt.storage.place import scheme_of

_UNIT_COST = 16 << 10
"""Bytes that could be read in the time that a unit takes besides."""

_RECORD_SECONDS = 2.0


class SharedLooking(Looking):
    """The work of one process of several.

    Args:
        command, paths, options, asked, progress: as for ``looking``.

    Raises:
        UsageError: as of ``looking``.
    """

    def __init__(
        self,
        command: str,
        paths: Sequence[str],
        options: Mapping[str, Any],
        asked: Asked,
        progress: Progress | None,
    ) -> None:
        share = parse_share(asked.share)
        self.wait = patience(asked.share, share, asked.wait)
        folder = "" if asked.records is None else os.fspath(asked.records)
        if share is None:
            raise UsageError("--records is for the processes of --share", remedy="leave it out, or give --share")
        if not folder:
            raise UsageError(
                "--share needs a folder that all processes see, for what each of them finds",
                remedy="name one with --records DIR",
            )
        if scheme_of(folder):
            raise UsageError("records are kept in a folder of a file system, not here", path=folder)
        self.share, self.folder = share, os.path.abspath(folder)
        self._paths, self._progress = paths, progress
        self._facts = {
            "version of anyckpt": own_version(),
            "command": command,
            "path": ", ".join(path if scheme_of(path) else os.path.abspath(path) for path in paths),
            "choice of options": ", ".join(f"{name}={value!r}" for name, value in sorted(options.items())),
        }
        self._records: LookRecords | None = None

    def look(self, units: Callable[[], Iterable[Unit]]) -> Mapping[str, Any]:
        started = time.monotonic()
        work = list(units())
        records = LookRecords(self.folder, self._identity(work), self.share.of)
        weights = [unit.nbytes + _UNIT_COST for unit in work]
        owners = dict(zip((unit.key for unit in work), divided(weights, self.share.of), strict=True))
        records.begin(self.share, answers=self.wait > 0)
        try:
            with beating(records):
                own = [unit for unit in work if owners[unit.key] == self.share.number]
                self._look_at(own, records)
                if self.wait:
                    self._wait_for(work, owners, records)
            found = records.found()
            missing = self._missing(work, owners, found)
            if not missing and (self.wait or not records.is_awaited()) and records.take():
                self._records = records
                return found
        except BaseException as error:
            records.close(failure=str(error) or type(error).__name__)
            raise
        records.close()
        if records.is_answered():
            missing = {}
        told = tuple(f"{one.number}/{one.of}" for one in missing)
        read = sum(unit.nbytes for unit in own)
        self.part = LookedAt(f"{self.share.number}/{self.share.of}", told, read, time.monotonic() - started)
        return {}

    def _identity(self, work: Sequence[Unit]) -> dict[str, Any]:
        described = ((unit.key, unit.nbytes, *unit.tensors, *unit.sources) for unit in work)
        on_disk = [path for path in self._paths if os.path.lexists(path)]
        state = fingerprint_of((value for values in described for value in values), on_disk)
        if state.obstacle is not None:
            raise UsageError(
                "cannot be divided between processes, because part of it has no identity: they cannot tell that they "
                "look at the same",
                found=state.obstacle,
                remedy="look at it with one process",
            )
        return {**self._facts, "state of what is read": state.value[:12]}

    def _look_at(self, own: Sequence[Unit], records: LookRecords) -> None:
        known = records.found()
        meter = Meter(sum(unit.nbytes for unit in own), self._progress)
        buffer: dict[str, Any] = {}
        lock, due = threading.Lock(), time.monotonic() + _RECORD_SECONDS

        def one(unit: Unit, advance: Advance) -> None:
            nonlocal due
            found = unit.look(advance)
            with lock:
                buffer[unit.key] = found
                if time.monotonic() >= due:
                    records.add(buffer)
                    buffer.clear()
                    due = time.monotonic() + _RECORD_SECONDS

        done = [unit for unit in own if unit.key in known]
        if done:
            meter.advance(sum(unit.nbytes for unit in done))
        left = [unit for unit in own if unit.key not in known]
        try:
            each_of_tensors(one, left, lambda unit: unit.tensors, meter)
        finally:
            if buffer:
                records.add(buffer)

    def _wait_for(self, work: Sequence[Unit], owners: Mapping[str, int], records: LookRecords) -> None:
        watch, pauses = Watch(self.wait), pausing()
        while not records.is_answered():
            watch.looks_other(records)
            missing = self._missing(work, owners, records.found())
            if not missing:
                return
            if watch.is_over(missing):
                raise OutputError(
                    "there is no answer, because not all shares of the work are done",
                    path=self.folder,
                    found=watch.told_of(missing),
                    remedy=watch.remedy(missing),
                )
            next(pauses)

    def _missing(self, work: Sequence[Unit], owners: Mapping[str, int], found: Mapping[str, Any]) -> dict[Share, int]:
        missing: dict[Share, int] = {}
        for unit in work:
            if unit.key not in found:
                share = Share(owners[unit.key], self.share.of)
                missing[share] = missing.get(share, 0) + unit.nbytes
        return dict(sorted(missing.items()))

    def end(self, *, answered: bool) -> None:
        if self._records is not None:
            self._records.remove() if answered else self._records.give_back()
            self._records.close()
