"""A folder of files, wherever it is: a local directory, or a directory inside a tar archive.

A checkpoint's index names its files; what it names is hostile until proved to be inside the folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from anyckpt.errors import UnsafeError, reading_error
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource

_MAX_DEPTH = 4


class Folder(Protocol):
    """Files by name.

    Attributes:
        name: what to call the folder in a message.
    """

    @property
    def name(self) -> str: ...

    def names(self) -> Sequence[str]:
        """Every file in the folder and in folders below it, relative to it, with ``/``; sorted."""
        ...

    def open(self, name: str) -> ByteSource:
        """The file called ``name``.

        Raises:
            UnsafeError: the name leads out of the folder.
            FormatError: there is no such file.
        """
        ...


def check_inside(name: str, folder: str) -> str:
    """``name`` if it stays inside the folder.

    Args:
        name: as an index or archive spells it.
        folder: the folder's name, for the message.

    Raises:
        UnsafeError: it is empty, absolute, climbs out with ``..``, or holds a NUL or a backslash.
    """
    parts = name.split("/")
    if not name or os.path.isabs(name) or ".." in parts or "\0" in name or "\\" in name:
        raise UnsafeError(
            "a file is named that is not inside the checkpoint",
            path=folder,
            expected="a relative path without '..'",
            found=repr(name),
            remedy="do not open this checkpoint with other software before finding out where it came from",
        )
    return name


class LocalFolder:
    """A directory on a local or mounted file system; symbolic links are followed, as every loader does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._names: list[str] | None = None

    def names(self) -> Sequence[str]:
        """Files in the directory and at most four levels below it, as they were when first asked for.

        Raises:
            FormatError: the directory cannot be listed.
        """
        if self._names is None:
            self._names = self._list()
        return self._names

    def _list(self) -> list[str]:
        found: list[str] = []
        todo = [("", 0)]
        while todo:
            prefix, depth = todo.pop()
            try:
                with os.scandir(os.path.join(self.name, prefix)) as entries:
                    for entry in entries:
                        if entry.is_file():
                            found.append(prefix + entry.name)
                        elif depth < _MAX_DEPTH and entry.is_dir():
                            todo.append((f"{prefix}{entry.name}/", depth + 1))
            except OSError as error:
                raise reading_error("be listed", self.name, error) from error
        return sorted(found)

    def open(self, name: str) -> ByteSource:
        """As the protocol says."""
        return LocalFile(os.path.join(self.name, check_inside(name, self.name)))
