"""What is known of blocks whose bytes are durable, and the journals that keep it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.files import sync_file
from anyckpt.errors import OutputError

BlockKey = tuple[int, int]
"""A block by its file's index in the plan and its first byte there."""


@dataclass
class BlockRecord:
    """What is kept of a finished block: the checksums that later parts and the manifest need.

    Attributes:
        crcs: (part, first byte, CRC-32, length) of each piece whose CRC is asked for.
        digests: (part, first byte, digest) of each piece of a tensor.
        edges: (first byte in the file, bytes) of what is not written yet, because another process writes bytes of the
            same page; at most a page at either end.  Who finishes the output writes them.
    """

    crcs: list[tuple[int, int, int, int]] = field(default_factory=list)
    digests: list[tuple[int, int, int]] = field(default_factory=list)
    edges: list[tuple[int, bytes]] = field(default_factory=list)

    def to_row(self, key: BlockKey) -> list[Any]:
        """As a journal has it."""
        edges = [[offset, base64.b64encode(data).decode("ascii")] for offset, data in self.edges]
        return [*key, self.crcs, self.digests, *([edges] if edges else [])]

    @staticmethod
    def of_row(row: list[Any]) -> tuple[BlockKey, BlockRecord]:
        """What ``to_row`` was given."""
        file, offset, crcs, digests, *edges = row
        record = BlockRecord(
            [tuple(crc) for crc in crcs],
            [tuple(digest) for digest in digests],
            [(at, base64.b64decode(text)) for at, text in (edges[0] if edges else ())],
        )
        return (file, offset), record


class Journal:
    """The list of durable blocks that one process keeps, a line for each time that it made some durable.

    Args:
        path: where; continued after its last whole line if it exists.
        header: what the first line says.
        by: who writes it now, as people say it.

    Attributes:
        path: where it is.
        is_new: whether there was none before.

    Raises:
        BlockingIOError: another process keeps it.
        OSError: it cannot be opened or written.
    """

    def __init__(self, path: str, header: Mapping[str, Any], by: str = "") -> None:
        self.path = path
        self._lock = threading.Lock()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._file = os.fdopen(descriptor, "a", encoding="ascii")
        try:
            _lock_soon(descriptor)
            entries, length = _entries(path, 0)
            os.truncate(path, length)
            self.is_new = not entries
            self.append({**(header if self.is_new else {}), **({"by": by} if by else {})})
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line, durably; from any thread."""
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            sync_file(self._file.fileno())

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Note blocks whose bytes are durable."""
        self.append({"blocks": [record.to_row(key) for key, record in blocks.items()]})

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Trouble:
    """What is known of a share that no process is at work on.

    Attributes:
        text: in words.
        gave_up: its process said itself that it does not go on.
    """

    text: str
    gave_up: bool = False


def process_in_words() -> str:
    """This process, as people tell it from those of other hosts."""
    return f"process {os.getpid()} on {os.uname().nodename}"


def own_version() -> str:
    """Of anyckpt, here."""
    from anyckpt import __version__

    return __version__


def check_maker(header: Mapping[str, Any], fingerprint: str, *, alone: bool, by: str, output: str, anew: str) -> None:
    """Raise unless what a process noted is of the plan of this one.

    Args:
        header: what it noted: ``fingerprint``, ``version`` and ``share``, where they are known.
        fingerprint: of the plan.
        alone: whether this process does all of the plan.
        by: what the other one is called, if that is known.
        output: what to call the output in a message.
        anew: what processes that share the work do to begin anew.

    Raises:
        OutputError: it is of another version, whose plans may be others, or of another plan.
    """
    share = header.get("share")
    who = ", ".join(filter(None, (f"share {share[0]} of {share[1]}" if share else "", by)))
    found = header.get("version", own_version())
    if found != own_version() and not alone:
        raise OutputError(
            "is being written by processes of another version of anyckpt",
            path=output,
            expected=f"anyckpt {own_version()}, as here",
            found=f"anyckpt {found}, {who or 'another process'}",
            remedy=f"give all processes the same version, and {anew} to begin anew with it",
        )
    plan = header.get("fingerprint", fingerprint)
    if plan != fingerprint:
        remedy = f"give all processes the same sources and options; {anew} to begin anew"
        raise OutputError(
            "the unfinished work here is of another conversion, or its source has changed since",
            path=output,
            expected=f"plan {fingerprint[:12]}",
            found=f"plan {plan[:12]}" + (f" of {who}" if who else ""),
            remedy="run without --resume to begin anew" if alone else remedy,
        )


class JournalReader:
    """What a journal says so far, which its process may go on to write; each line is read once.

    Attributes:
        header: what the first line says; empty as long as there is none.
        records: the blocks that it lists.
        failure: why its process gave up, empty if it did not.
        by: who wrote it last, empty if that is not known.
        length: bytes that were read; more whenever its process has shown that it is at work.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.records: dict[BlockKey, BlockRecord] = {}
        self.failure = ""
        self.by = ""
        self.length = 0

    def read_on(self) -> JournalReader:
        """Take in the lines that were added; a line that is not whole yet is left for later."""
        entries, length = _entries(self.path, self.length)
        self.length += length
        for entry in entries:
            self.header = self.header or entry
            self.failure = str(entry.get("failed", ""))
            self.by = str(entry.get("by", self.by))
            self._take(entry)
        return self

    def _take(self, entry: Mapping[str, Any]) -> None:
        """Take in what a line says of the work."""
        self.records.update(BlockRecord.of_row(row) for row in entry.get("blocks", ()))

    def trouble(self) -> Trouble:
        """What is known of why no process is writing it."""
        what = f"gave up: {self.failure}" if self.failure else "stopped"
        return Trouble(f"{self.by} {what}".lstrip(), bool(self.failure))

    def is_kept(self) -> bool:
        """Whether a process that can be seen from here is writing it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            lock(descriptor, fcntl.LOCK_SH)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def lock(descriptor: int, kind: int) -> bool:
    """Lock an open file against other processes, without waiting; whether the file system knows how to.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from error
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _lock_soon(descriptor: int) -> None:
    """Lock a journal; who only looks whether it is kept (``is_kept``) has it for a moment."""
    for left in range(50, -1, -1):
        try:
            lock(descriptor, fcntl.LOCK_EX)
            break
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.01)


def _entries(path: str, start: int) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal from a byte on to the first line that was not written whole, and their bytes."""
    entries: list[dict[str, Any]] = []
    length = 0
    with open(path, "rb") as file:
        file.seek(start)
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
