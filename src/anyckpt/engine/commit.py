"""The commit protocol: an output appears whole under its name, or not at all.

Everything is written into a hidden directory beside the destination, made durable, and renamed at the end.  A
journal in that directory says which blocks are durable, so that interrupted work can be continued.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from dataclasses import dataclass, field
from typing import Any, TextIO

from anyckpt.engine.files import sync_directory, write_error
from anyckpt.errors import OutputError
from anyckpt.storage.source import forget_open_file

_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass
class BlockRecord:
    """What is kept of a finished block: the checksums that later parts and the manifest need.

    Attributes:
        crcs: (part, first byte, CRC-32, length) of each piece whose CRC is asked for.
        digests: (part, first byte, digest) of each piece of a tensor.
    """

    crcs: list[tuple[int, int, int, int]] = field(default_factory=list)
    digests: list[tuple[int, int, int]] = field(default_factory=list)


class Staging:
    """The hidden directory in which an output is prepared.

    Args:
        destination: the output's final path.
        fingerprint: identifies the plan and its sources; work of another fingerprint is not continued.
        resume: continue what an earlier run left, if it is of the same fingerprint.
        overwrite: an existing destination may be replaced, at the end.

    Raises:
        OutputError: the destination exists, another process is writing it, or there is other work to resume.
    """

    def __init__(self, destination: str, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self.destination = os.path.abspath(destination)
        self.overwrite = overwrite
        parent, name = os.path.split(self.destination)
        if os.path.lexists(self.destination) and not overwrite:
            raise OutputError("already exists", path=destination, remedy="choose another path or pass --overwrite")
        self._directory = os.path.join(parent, f".{name}.anyckpt-partial")
        self.output = os.path.join(self._directory, "output")
        self.finished: dict[tuple[int, int], BlockRecord] = {}
        try:
            os.makedirs(self._directory, exist_ok=True)
        except OSError as error:
            raise write_error(destination, error) from error
        self._lock = self._acquire_lock()
        try:
            self._journal = self._open_journal(fingerprint, resume)
        except OSError as error:
            os.close(self._lock)
            raise write_error(destination, error) from error
        except OutputError:
            os.close(self._lock)
            raise

    def _open_journal(self, fingerprint: str, resume: bool) -> TextIO:
        path = os.path.join(self._directory, "journal")
        if resume and os.path.exists(path) and self._load(path, fingerprint):
            return open(path, "a", encoding="ascii")
        self._clear()
        journal = open(path, "a", encoding="ascii")
        _append(journal, {"fingerprint": fingerprint})
        return journal

    def _acquire_lock(self) -> int:
        descriptor = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise OutputError(
                    "is being written by another process",
                    path=self.destination,
                    remedy="wait for it to finish",
                ) from error
        return descriptor

    def _load(self, path: str, fingerprint: str) -> bool:
        entries, length = _journal_entries(path)
        if not entries or not os.path.lexists(self.output):
            return False
        if entries[0].get("fingerprint") != fingerprint:
            raise OutputError(
                "the unfinished work here is of another conversion, or its source has changed since",
                path=self._directory,
                remedy="run without --resume to begin anew",
            )
        os.truncate(path, length)
        for entry in entries[1:]:
            for file, offset, crcs, digests in entry.get("blocks", ()):
                record = BlockRecord([tuple(c) for c in crcs], [tuple(d) for d in digests])
                self.finished[file, offset] = record
        return True

    def record(self, blocks: dict[tuple[int, int], BlockRecord]) -> None:
        """Note blocks whose bytes are durable.

        Raises:
            OutputError: the journal cannot be written.
        """
        rows = [[file, offset, done.crcs, done.digests] for (file, offset), done in blocks.items()]
        try:
            _append(self._journal, {"blocks": rows})
        except OSError as error:
            raise write_error(self.destination, error) from error

    def commit(self, manifest: bytes, manifest_path: str | None) -> None:
        """Rename the output, which is durable, to its final name.

        Args:
            manifest: contents of the manifest of a single-file output.
            manifest_path: where it goes, beside the output; None if the output already holds it.

        Raises:
            OutputError: the system refuses; the old destination, if any, is untouched.
        """
        try:
            if os.path.isdir(self.output):
                for folder, _, _ in os.walk(self.output):
                    sync_directory(folder)
            prepared = os.path.join(self._directory, "manifest")
            if manifest_path is not None:
                with open(prepared, "wb") as file:
                    file.write(manifest)
                    file.flush()
                    os.fsync(file.fileno())
                if os.path.lexists(manifest_path):
                    os.unlink(manifest_path)
            forget_open_file(self.destination)
            self._rename()
            if manifest_path is not None:
                os.replace(prepared, manifest_path)
            sync_directory(os.path.dirname(self.destination))
        except OSError as error:
            raise write_error(self.destination, error) from error
        self.discard()

    def _rename(self) -> None:
        if not os.path.lexists(self.destination):
            os.rename(self.output, self.destination)
        elif not self.overwrite:
            raise OutputError("has appeared meanwhile", path=self.destination, remedy="choose another path")
        elif not os.path.isdir(self.output) and not os.path.isdir(self.destination):
            os.replace(self.output, self.destination)
        elif not _exchange(self.output, self.destination):
            old = os.path.join(self._directory, "old")
            os.rename(self.destination, old)
            os.rename(self.output, self.destination)

    def close(self) -> None:
        """Leave the work as it is, to be continued by another run."""
        self._journal.close()
        os.close(self._lock)

    def discard(self) -> None:
        """Remove every trace of the work."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _clear(self) -> None:
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif name != "lock":
                os.unlink(path)


def _append(journal: TextIO, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry, separators=(",", ":")) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _journal_entries(path: str) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal up to the first line that was not written whole, and the bytes up to there."""
    entries: list[dict[str, Any]] = []
    length = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or not line.endswith(b"\n"):
                break
            entries.append(entry)
            length += len(line)
    return entries, length


def _exchange(first: str, second: str) -> bool:
    """Swap two directory entries in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)
