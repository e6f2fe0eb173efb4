"""Places: where files are found by path, whatever holds them.

Readers know no operating system.  They list, open and name files through a ``Location``, so that a folder inside an
archive, or one that no disk holds, is read by the same code as a directory.  A place of another kind implements
``Place`` (or gives ``Tree`` a listing) and is found by the scheme of its paths, as ``location.SCHEMES`` has it.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from contextlib import suppress

from anyckpt.errors import FormatError, reading_error
from anyckpt.storage.folder import Folder, LocalFolder
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource

FILE, FOLDER, OTHER = "file", "folder", "other"
"""What may be at a path; ``OTHER`` is what does not stay as it is: a device, a pipe."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://|(hf):(?=[^/]|/[^/])")

_INSTEAD = {
    "msc": "give the address of the store that the profile names (base_path of its storage_provider) in its place: "
    "s3://BUCKET/FOLDER",
}
"""What to do with paths of schemes that are known and not read."""


class Place(ABC):
    """Files by path, in folders.

    Paths are text as a user gives it; only their place joins and splits them.
    """

    is_far = False
    """Whether every read of its files is waited for, so that it pays to ask for many at once."""

    def shown(self, path: str) -> str:
        """The path as it may be shown and kept: without what a signed address is signed with."""
        return path

    @abstractmethod
    def kind(self, path: str) -> str | None:
        """``FILE``, ``FOLDER`` or ``OTHER``, links followed; None if nothing is there.

        Raises:
            FormatError: that cannot be told.
        """

    @abstractmethod
    def names(self, path: str) -> tuple[str, ...]:
        """What is in a folder, sorted.

        Raises:
            FormatError: it cannot be listed.
        """

    @abstractmethod
    def open(self, path: str) -> ByteSource:
        """The bytes of a file; reads none of them.  Of a far place, the same source each time.

        Raises:
            FormatError: there is no such file, or it cannot be opened.
        """

    @abstractmethod
    def folder(self, path: str) -> Folder:
        """The files in a folder and below it."""

    @abstractmethod
    def join(self, path: str, *names: str) -> str:
        """The path of what is called so below ``path``; a name may have several parts, with ``/`` between."""

    @abstractmethod
    def split(self, path: str) -> tuple[str | None, str]:
        """The folder that holds what is at ``path``, None if none is known; and what it is called there."""

    def is_file(self, path: str) -> bool:
        with suppress(FormatError):
            return self.kind(path) == FILE
        return False

    def is_folder(self, path: str) -> bool:
        with suppress(FormatError):
            return self.kind(path) == FOLDER
        return False

    def exists(self, path: str) -> bool:
        """Whether anything is there, a broken link included."""
        with suppress(FormatError):
            return self.kind(path) is not None
        return False

    def real(self, path: str) -> str:
        """The path without links."""
        return path

    def on_disk(self, path: str) -> str | None:
        """The local file or directory that it is, or lies in; None if it is on no disk."""
        return None

    def digest(self, path: str) -> tuple[str, str] | None:
        """The algorithm (of ``hashlib``, or ``git`` for a blob's id) and the value that the place has for a file."""
        return None

    def nothing_at(self, path: str) -> FormatError:
        """What to raise where something should be."""
        return FormatError("does not exist", path=path or "''", remedy="check the path")


class LocalPlace(Place):
    """Local and mounted file systems."""

    def kind(self, path: str) -> str | None:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise reading_error("be opened", path, error) from error
        return FOLDER if stat.S_ISDIR(mode) else FILE if stat.S_ISREG(mode) else OTHER

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def names(self, path: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(path)))
        except OSError as error:
            raise reading_error("be listed", path, error) from error

    def open(self, path: str) -> ByteSource:
        return LocalFile(path)

    def folder(self, path: str) -> Folder:
        return LocalFolder(path)

    def join(self, path: str, *names: str) -> str:
        return os.path.join(path, *names)

    def split(self, path: str) -> tuple[str | None, str]:
        folder, name = os.path.split(os.path.normpath(path))
        if folder and name not in ("", "..", "."):
            return folder, name
        folder, name = os.path.split(os.path.abspath(path))
        return folder, name

    def real(self, path: str) -> str:
        return os.path.realpath(path)

    def nothing_at(self, path: str) -> FormatError:
        scheme = scheme_of(path)
        if scheme is None:
            return super().nothing_at(path)
        return FormatError(
            f"is in a place that is not known: {scheme}://",
            path=path,
            expected="a path on a disk, or hf://, s3://, gs://, az:// or https://",
            remedy=_INSTEAD.get(scheme, "copy it to a disk first"),
        )

    def on_disk(self, path: str) -> str | None:
        return path


LOCAL = LocalPlace()


def scheme_of(path: str) -> str | None:
    """What a path begins with before ``://``, or before ``:`` where that names no file; None of a path on a disk."""
    found = _SCHEME.match(path)
    return None if found is None else found[1] or found[2]
