"""Notes of files of an output that are whole in an object store, so that interrupted work goes on from them."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from anyckpt.engine.destination import Share
from anyckpt.engine.plan import OutputFile
from anyckpt.engine.records import BlockKey, BlockRecord, check_maker, own_version, process_in_words
from anyckpt.errors import OutputError
from anyckpt.storage.objects import Objects

_WRITTEN_EVERY = 5.0
_LARGE = 64 << 20


class Notes:
    """What processes noted below one folder of a store, each in objects of its own that never change.

    Args:
        objects: the store.
        folder: the folder.
        output: what to call the output in a message.
    """

    def __init__(self, objects: Objects, folder: str, output: str) -> None:
        self._objects = objects
        self._folder = folder
        self._output = output
        self._lock = threading.Lock()
        self._run = uuid.uuid4().hex[:12]
        self._fingerprint = ""
        self._share: Share | None = None
        self._count = 0
        self._blocks: dict[int, dict[BlockKey, BlockRecord]] = {}
        self._due: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._read: dict[str, dict[str, Any]] = {}

    def begin(self, fingerprint: str, share: Share | None) -> None:
        """Say whose notes are added from now on."""
        self._fingerprint, self._share = fingerprint, share

    def add(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Take in blocks that are written of files that are not whole yet."""
        with self._lock:
            for key, record in blocks.items():
                self._blocks.setdefault(key[0], {})[key] = record

    def whole(self, number: int, file: OutputFile, tag: str) -> None:
        """Note that a file is whole, now or with others in a moment.

        Raises:
            OutputError: the store refuses.
        """
        with self._lock:
            rows = [record.to_row(key) for key, record in self._blocks.pop(number, {}).items()]
            self._due.append({"file": number, "path": file.path, "bytes": file.nbytes, "tag": tag, "blocks": rows})
            due = file.nbytes >= _LARGE or time.monotonic() - self._written >= _WRITTEN_EVERY
        if due:
            self.write()

    def write(self, failure: str = "") -> None:
        """Write what is not written yet.

        Args:
            failure: why this process gives up; empty if it does not.

        Raises:
            OutputError: the store refuses.
        """
        with self._lock:
            files, self._due = self._due, []
            self._written = time.monotonic()
            self._count += 1
            key = f"{self._folder}/notes-{self._run}-{self._count:06d}"
        if not files and not failure:
            return
        said: dict[str, Any] = {"plan": self._fingerprint, "files": files}
        if self._share is not None:
            said |= {"share": [self._share.number, self._share.of], "failed": failure}
            said |= {"version": own_version(), "by": process_in_words()}
        try:
            self._objects.put(key, json.dumps(said, separators=(",", ":")).encode())
        except BaseException:
            with self._lock:
                self._due = files + self._due
            raise

    def read(self) -> None:
        """Take in what was noted since.

        Raises:
            OutputError: the store refuses.
        """
        names = sorted(key for key in self._objects.listed(self._folder) if "/notes-" in key)
        with self._lock:
            known = self._read
        new = {key: found for key in names if key not in known and (found := self._objects.read(key)) is not None}
        with self._lock:
            self._read = {
                key: known[key] if key in known else json.loads(new[key][0])
                for key in names
                if key in known or key in new
            }

    def _notes(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._read.values())

    def check(self, fingerprint: str, *, alone: bool) -> None:
        """Read all notes; raise unless they are of one plan.

        Args:
            fingerprint: of the plan.
            alone: whether one process does it all.

        Raises:
            OutputError: it is not, or the store refuses.
        """
        self.read()
        clean = f"anyckpt clean {self._output}"
        for note in self._notes():
            check_maker(
                {**note, "fingerprint": note["plan"]},
                fingerprint,
                alone=alone,
                by=note.get("by", ""),
                output=self._objects.name_of(self._folder),
                anew=f"run {clean}",
            )
            share = note.get("share")
            if share and self._share is not None and share[1] != self._share.of:
                raise OutputError(
                    f"is being written by processes of which each does 1/{share[1]} of the work",
                    path=self._output,
                    expected=f"1/{self._share.of}",
                    remedy=f"give all processes the same number of shares; run {clean} to begin anew",
                )

    def keep_only(self, is_there: Callable[[str, int, str], bool]) -> None:
        """Forget files that are no longer as they were noted.

        Args:
            is_there: tells of a path, size and tag whether the file is there.
        """
        for note in self._notes():
            note["files"] = [file for file in note["files"] if is_there(file["path"], file["bytes"], file["tag"])]

    def files(self) -> set[int]:
        """Indices of the files that are whole."""
        return {file["file"] for note in self._notes() for file in note["files"]}

    def records(self) -> dict[BlockKey, BlockRecord]:
        """The blocks of files that are whole."""
        found: dict[BlockKey, BlockRecord] = {}
        for note in self._notes():
            for file in note["files"]:
                found.update(BlockRecord.of_row(row) for row in file["blocks"])
        return found

    def failures(self) -> dict[Share, str]:
        """Why processes gave up that did not begin again."""
        found = {}
        for note in self._notes():
            if note.get("share"):
                found[Share(*note["share"])] = note.get("failed", "")
        return {share: failure for share, failure in found.items() if failure}

    def clear(self, keep: Collection[int]) -> None:
        """Remove the notes, unless they are of files that are kept.

        Raises:
            OutputError: the store refuses.
        """
        if not keep:
            names = [key for key in self._objects.listed(self._folder) if "/notes-" in key]
            self._objects.delete(names)
            self._read.clear()
