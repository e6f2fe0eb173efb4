"""What each of several processes that look at one thing together has found, in a folder that all of them see.

A process keeps one file there, a line for what it found every now and then, and goes on from it when it is run again.
Who has the records of all of them answers, and removes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from anyckpt.engine.destination import BusyError, Share
from anyckpt.engine.files import remove_emptied, write_error
from anyckpt.engine.records import Journal, JournalReader, Trouble, process_in_words
from anyckpt.errors import OutputError

_PREFIX = "anyckpt-share-"
_ANSWERING = "anyckpt-answering"


class _Reader(JournalReader):
    """Of one process's file.

    Attributes:
        found: what it found, by key.
        answers: its process waits for the others, and answers.
        made: it made the folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.found: dict[str, Any] = {}
        self.answers = self.made = False

    def _take(self, entry: Mapping[str, Any]) -> None:
        self.found.update(entry.get("found", {}))
        self.answers = bool(entry.get("answers", self.answers))
        self.made = self.made or bool(entry.get("made"))


class LookRecords:
    """The records of processes that look at one thing, as one of them sees them.

    Args:
        folder: a local path that all of them see; made if it is not there.
        facts: what they look at and how, in words and numbers, the same in all of them.
        of: how many there are.
    """

    def __init__(self, folder: str, facts: Mapping[str, Any], of: int) -> None:
        self._folder = folder
        self._of = of
        self._facts = {**facts, "number of shares": of}
        self._readers: dict[str, _Reader] = {}
        self._journal: Journal | None = None
        self._own = ""

    def begin(self, share: Share, *, answers: bool) -> None:
        """Keep this process's record, and go on with what is there of it.

        Args:
            share: which share it does.
            answers: it waits for the others and answers.

        Raises:
            BusyError: another process does this share.
            OutputError: records of something else are there, or the folder cannot be written.
        """
        self._own = os.path.join(self._folder, f"{_PREFIX}{share.number}-of-{share.of}")
        header = {"look": self._facts, "share": [share.number, share.of]}
        try:
            made = self._make_folder()
            self._journal = Journal(self._own, header, process_in_words())
            self._journal.append({"answers": answers, "made": made})
        except BlockingIOError as error:
            raise BusyError(f"share {share} is done by another process", path=self._folder) from error
        except OSError as error:
            raise write_error(self._folder, error) from error
        try:
            for reader in self._read():
                self._check(reader)
        except OutputError:
            is_new = self._journal.is_new
            self.close()
            if is_new:
                os.unlink(self._own)
                if made:
                    os.rmdir(self._folder)
            raise

    def _make_folder(self) -> bool:
        try:
            os.mkdir(self._folder)
        except FileExistsError:
            return False
        return True

    def _check(self, reader: _Reader) -> None:
        other = reader.header.get("look", {})
        for name, own in self._facts.items():
            if other.get(name) != own:
                raise OutputError(
                    f"is a record of another {name}",
                    path=reader.path,
                    expected=own,
                    found=other.get(name),
                    remedy="give all processes the same paths, options and version, and nothing else this folder; "
                    f"remove {_PREFIX}* in it to begin anew",
                )

    def add(self, found: Mapping[str, Any]) -> None:
        """Note what was found.

        Raises:
            OutputError: the system refuses.
        """
        assert self._journal is not None
        try:
            self._journal.append({"found": dict(found)})
        except OSError as error:
            raise write_error(self._folder, error) from error

    def close(self, failure: str = "") -> None:
        """Leave the record as it is; with ``failure``, for whoever waits, why this process gives up."""
        journal, self._journal = self._journal, None
        if journal is not None:
            if failure:
                with suppress(OSError):
                    journal.append({"failed": failure})
            journal.close()

    def found(self) -> dict[str, Any]:
        """What all processes have found so far, by key."""
        return {key: value for reader in self._read() for key, value in reader.found.items()}

    def is_answered(self) -> bool:
        """Whether another process has taken the records to answer."""
        return not os.path.lexists(self._own) or os.path.lexists(self._path(_ANSWERING))

    def is_awaited(self) -> bool:
        """Whether a process waits for all records, and answers."""
        return any(reader.answers and reader.is_kept() for reader in self._read())

    def take(self) -> bool:
        """Take the records to answer; False if another process has."""
        try:
            os.rename(self._first(), self._path(_ANSWERING))
        except FileNotFoundError:
            return False
        return True

    def give_back(self) -> None:
        """The answer could not be given."""
        with suppress(OSError):
            os.rename(self._path(_ANSWERING), self._first())

    def _first(self) -> str:
        return self._path(f"{_PREFIX}1-of-{self._of}")

    def remove(self) -> None:
        """Remove every trace: the answer is given."""
        own = (self._path(f"{_PREFIX}{number}-of-{self._of}") for number in range(2, self._of + 1))
        for path in (*own, self._path(_ANSWERING)):
            with suppress(FileNotFoundError):
                os.unlink(path)
        self.close()
        if any(reader.made for reader in self._readers.values()):
            remove_emptied(self._folder)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _read(self) -> Iterator[_Reader]:
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return
        for name in names:
            if name.startswith(_PREFIX):
                path = self._path(name)
                try:
                    reader = self._readers.setdefault(path, _Reader(path))
                    reader.read_on()
                except FileNotFoundError:
                    continue
                if "share" in reader.header:
                    yield reader

    def beat(self) -> None:
        """As of ``Destination``."""
        journal = self._journal
        if journal is not None:
            with suppress(OSError, ValueError):
                journal.append({})

    def signs(self) -> dict[Share, int]:
        """As of ``Destination``."""
        return {Share(*reader.header["share"]): reader.length for reader in self._read()}

    def troubles(self) -> dict[Share, Trouble]:
        """As of ``Destination``."""
        return {Share(*reader.header["share"]): reader.trouble() for reader in self._read() if not reader.is_kept()}
