"""The journals of an output that is being prepared, one of each process that does it or a share of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from anyckpt.engine.destination import Share
from anyckpt.engine.records import (
    BlockKey,
    BlockRecord,
    Journal,
    JournalReader,
    Trouble,
    check_maker,
    own_version,
    process_in_words,
)
from anyckpt.errors import OutputError

_NAME = "journal"


class Journals:
    """The journals in a directory, of which one may be this process's own.

    Args:
        directory: where the output is prepared.
        output: its path as the user gave it, for messages.
    """

    def __init__(self, directory: str, output: str) -> None:
        self._directory = directory
        self._output = output
        self._readers: dict[str, JournalReader] = {}
        self._own: Journal | None = None

    def begin(self, fingerprint: str, share: Share | None) -> None:
        """Keep one, of a whole plan or a share of it; what it has already stays.

        Raises:
            BlockingIOError: another process does this share.
            OSError: it cannot be written.
        """
        header: dict[str, Any] = {"fingerprint": fingerprint}
        name, by = _NAME, ""
        if share is not None:
            header |= {"share": [share.number, share.of], "version": own_version()}
            name, by = f"{_NAME}.{share.number}-of-{share.of}", process_in_words()
        self._own = Journal(os.path.join(self._directory, name), header, by)

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Note blocks whose bytes are durable.

        Raises:
            OSError: it cannot be written.
        """
        assert self._own is not None
        self._own.record(blocks)

    def close(self, failure: str = "") -> None:
        """Keep none any more; why not, where the work failed, is noted."""
        if self._own is not None:
            if failure:
                with suppress(OSError):
                    self._own.append({"failed": failure})
            self._own.close()
            self._own = None

    def forget(self) -> None:
        """Read all anew, for they were removed."""
        self._readers.clear()

    def check(self, fingerprint: str, share: Share | None) -> None:
        """Raise unless all work here is of this plan, and all processes that do it divide it in one way.

        Raises:
            OutputError: it is of another plan, or of processes of another version or number.
        """
        for reader in self._read():
            try:
                check_maker(
                    reader.header,
                    fingerprint,
                    alone=share is None,
                    by=reader.by,
                    output=self._directory,
                    anew="remove this directory",
                )
            except OutputError:
                self._forget_own()
                raise
            other = reader.header.get("share")
            if share is not None and other and other[1] != share.of and reader.is_kept():
                self._forget_own()
                raise OutputError(
                    f"is being written by processes of which each does 1/{other[1]} of the work",
                    path=self._output,
                    expected=f"1/{share.of}",
                    remedy="give all processes the same number of shares",
                )

    def _forget_own(self) -> None:
        """Remove this process's journal if it holds nothing."""
        if self._own is not None and self._own.is_new:
            os.unlink(self._own.path)
            self._readers.pop(self._own.path, None)

    def _read(self) -> Iterator[JournalReader]:
        try:
            names = sorted(os.listdir(self._directory))
        except (FileNotFoundError, NotADirectoryError):
            return  # nothing is begun, or the output is published
        for name in names:
            if name.partition(".")[0] == _NAME:
                path = os.path.join(self._directory, name)
                try:
                    yield self._readers.setdefault(path, JournalReader(path)).read_on()
                except FileNotFoundError:
                    continue  # the output was published meanwhile

    def records(self) -> dict[BlockKey, BlockRecord]:
        """The blocks that are durable."""
        found: dict[BlockKey, BlockRecord] = {}
        for reader in self._read():
            found.update(reader.records)
        return found

    def beat(self) -> None:
        """Show that this process is at work."""
        journal = self._own
        if journal is not None:
            with suppress(OSError, ValueError):  # a full disk is told by who writes; it may be closed at this moment
                journal.append({})

    def signs(self) -> dict[Share, int]:
        """What is seen of every share's process: how long its journal is."""
        return {Share(*reader.header["share"]): reader.length for reader in self._read() if "share" in reader.header}

    def troubles(self) -> dict[Share, Trouble]:
        """Shares whose processes stopped."""
        return {
            Share(*reader.header["share"]): reader.trouble()
            for reader in self._read()
            if "share" in reader.header and not reader.is_kept()
        }
