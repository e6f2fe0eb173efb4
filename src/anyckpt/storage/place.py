"""Places: where files are found by path, whatever holds them; and a location, which is a path in a place.

Readers know no operating system.  They list, open and name files through a ``Location``, so that a folder inside an
archive, or one that no disk holds, is read by the same code as a directory.  A place of another kind implements
``Place`` (or gives ``Tree`` a listing) and is found by the scheme of its paths, as ``SCHEMES`` has it.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from anyckpt.errors import FormatError
from anyckpt.storage.folder import Folder, LocalFolder, check_inside
from anyckpt.storage.members import SEPARATOR, members
from anyckpt.storage.source import ByteSource, LocalFile

FILE, FOLDER, OTHER = "file", "folder", "other"
"""What may be at a path; ``OTHER`` is what does not stay as it is: a device, a pipe."""

HEAD = 512
"""Bytes of a file that a location shows."""

_MOST_SHOWN = 8
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://")


class Place(ABC):
    """Files by path, in folders.

    Paths are text as a user gives it; only their place joins and splits them.
    """

    is_far = False
    """Whether every read of its files is waited for, so that it pays to ask for many at once."""

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
            raise _cannot("be opened", path, error) from error
        return FOLDER if stat.S_ISDIR(mode) else FILE if stat.S_ISREG(mode) else OTHER

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def names(self, path: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(path)))
        except OSError as error:
            raise _cannot("be listed", path, error) from error

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
            expected="a path on a disk",
            remedy="copy it to a disk first",
        )

    def on_disk(self, path: str) -> str | None:
        return path


def _cannot(what: str, path: str, error: OSError | ValueError) -> FormatError:
    return FormatError(f"cannot {what}: {getattr(error, 'strerror', None) or error}", path=path)


LOCAL = LocalPlace()


class Tree(Place):
    """Files that one listing tells with their sizes, as those of an archive or of an object store.

    Args:
        root: the path of the folder that holds them all.
        separator: what comes between ``root`` and the name of a file.
    """

    def __init__(self, root: str, separator: str = "/") -> None:
        self.root = root
        self._separator = separator

    @abstractmethod
    def listing(self) -> Mapping[str, ByteSource]:
        """Every file by its name below the root, with ``/`` between folders."""

    @cached_property
    def _folders(self) -> dict[str, tuple[str, ...]]:
        """What is in every folder."""
        inside: dict[str, set[str]] = {"": set()}
        for name in self.listing():
            while name:
                above, _, last = name.rpartition("/")
                known = above in inside
                inside.setdefault(above, set()).add(last)
                if known:
                    break
                name = above
        return {folder: tuple(sorted(names)) for folder, names in inside.items()}

    def inner(self, path: str) -> str:
        """The name below the root of what is at ``path``; empty for the root."""
        if path.rstrip("/") == self.root.rstrip("/"):
            return ""
        return path.removeprefix(self.root).removeprefix(self._separator).strip("/")

    def path_of(self, name: str) -> str:
        """The path of what has a name below the root."""
        return f"{self.root.rstrip('/')}{self._separator}{name}"

    def folders(self) -> list[str]:
        """Paths of all folders, those that hold others before these."""
        return [self.path_of(name) for name in sorted(self._folders, key=lambda name: (name.count("/"), name))]

    def kind(self, path: str) -> str | None:
        name = self.inner(path)
        return FILE if name in self.listing() else FOLDER if name in self._folders else None

    def names(self, path: str) -> tuple[str, ...]:
        found = self._folders.get(self.inner(path))
        if found is None:
            raise self.nothing_at(path)
        return found

    def open(self, path: str) -> ByteSource:
        found = self.listing().get(self.inner(path))
        if found is None:
            raise self.nothing_at(path)
        return found

    def folder(self, path: str) -> Folder:
        return _TreeFolder(self, self.inner(path), path)

    def join(self, path: str, *names: str) -> str:
        inner = self.inner(path)
        return self.path_of("/".join(part.strip("/") for part in (inner, *names) if part.strip("/")))

    def split(self, path: str) -> tuple[str | None, str]:
        inner = self.inner(path)
        above, _, name = inner.rpartition("/")
        if not inner:
            return None, re.split(r"[/:]", path.rstrip("/:"))[-1]
        return self.path_of(above), name


class _TreeFolder:
    """A folder of a tree, as the ``Folder`` protocol says."""

    def __init__(self, tree: Tree, inner: str, name: str) -> None:
        self.name = name
        self._prefix = f"{inner}/" if inner else ""
        self._tree = tree
        self._names: list[str] | None = None

    def names(self) -> Sequence[str]:
        if self._names is None:
            listed = self._tree.listing()
            self._names = sorted(name[len(self._prefix) :] for name in listed if name.startswith(self._prefix))
        return self._names

    def open(self, name: str) -> ByteSource:
        return self._tree.open(self._tree.path_of(self._prefix + check_inside(name, self.name)))


class ArchivePlace(Tree):
    """The files of a zip or tar archive: ``models.zip::policy.pth``, and ``models.zip::`` for its top folder.

    Args:
        root: the path of the archive.
        source: its bytes.
        holder: the place that it is in.
        outer: its path in that place.

    Its methods raise FormatError where it is no archive, or a damaged one, and UnsafeError where it has members that
    no archive of checkpoints needs.
    """

    def __init__(self, root: str, source: ByteSource, holder: Place, outer: str) -> None:
        super().__init__(root, SEPARATOR)
        self.is_far = holder.is_far
        self._source = source
        self._holder = holder
        self._outer = outer

    def listing(self) -> Mapping[str, ByteSource]:
        return self._files

    @cached_property
    def _files(self) -> dict[str, ByteSource]:
        return {name.removeprefix("./"): member for name, member in members(self._source).items()}

    def on_disk(self, path: str) -> str | None:
        return self._holder.on_disk(self._outer)

    def nothing_at(self, path: str) -> FormatError:
        names = list(self._files)
        return FormatError(
            f"has no member {self.inner(path)!r}",
            path=self.root,
            found=", ".join(names[:_MOST_SHOWN]) + (" ..." if names[_MOST_SHOWN:] else ""),
            remedy="name one of its members",
        )


SCHEMES: dict[str, Callable[[str], Place]] = {}
"""What makes the place of a path that begins with ``scheme://``, from the path."""


def scheme_of(path: str) -> str | None:
    """What a path begins with before ``://``; None of a path on a disk."""
    found = _SCHEME.match(path)
    return None if found is None else found[1]


def place_of(path: str) -> Place:
    """The place that a path is in; of archives that it leads into, those that hold others are opened.

    Raises:
        FormatError: what should be an archive is none, or holds no such archive.
        UnsafeError: see ``ArchivePlace``.
    """
    scheme = scheme_of(path)
    place = SCHEMES[scheme](path) if scheme in SCHEMES else LOCAL
    if SEPARATOR not in path or place.exists(path):
        return place
    parts = path.split(SEPARATOR)
    for count in range(len(parts) - 1, 0, -1):
        file = SEPARATOR.join(parts[:count])
        if place.is_file(file):
            return _into(place, file, parts[count:])
    return place


def _into(place: Place, file: str, inner: Sequence[str]) -> Place:
    """The place of the last of the members that lead on from a file, each but that one an archive."""
    for name in inner:
        if place.kind(file) is None:
            raise place.nothing_at(file)
        place = ArchivePlace(file, place.open(file), place, file)
        file = place.path_of(name)
    return place


@dataclass(frozen=True)
class Location:
    """What is at a path, looked at once for all formats' ``detect``.

    Attributes:
        path: as the user gave it; it may lead into an archive.
        is_directory: whether it is a folder.
        head: first 512 bytes of a file; empty for a folder.
        names: names in a folder, sorted; empty for a file.
        place: where the path is.
    """

    path: str
    is_directory: bool
    head: bytes = b""
    names: tuple[str, ...] = ()
    place: Place = LOCAL

    @property
    def name(self) -> str:
        """What it is called in the folder that holds it."""
        return self.place.split(self.path)[1]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1].lower()

    @property
    def parent(self) -> str | None:
        """The path of the folder that holds it; None if none is known."""
        return self.place.split(self.path)[0]

    @property
    def on_disk(self) -> str | None:
        """The local file or directory that it is, or lies in; None if it is on no disk."""
        return self.place.on_disk(self.path)

    def join(self, *names: str) -> str:
        """The path of what is below it."""
        return self.place.join(self.path, *names)

    def at(self, *names: str) -> Location:
        """What is below it; itself without names.

        Raises:
            FormatError: nothing is, or it cannot be read.
        """
        return look_in(self.place, self.join(*names)) if names else self

    def open(self, *names: str) -> ByteSource:
        """The bytes of the file that it is, or of one below it.

        Raises:
            FormatError: it cannot be opened.
        """
        return self.place.open(self.join(*names) if names else self.path)

    def folder(self, *names: str) -> Folder:
        """The files in the folder that it is, or in one below it."""
        return self.place.folder(self.join(*names) if names else self.path)

    def is_file(self, *names: str) -> bool:
        return self.place.is_file(self.join(*names))

    def is_folder(self, *names: str) -> bool:
        return self.place.is_folder(self.join(*names))

    def names_in(self, *names: str) -> tuple[str, ...]:
        """What is in a folder below it, sorted; nothing if there is no such folder, or it cannot be listed."""
        with suppress(FormatError):
            return self.place.names(self.join(*names)) if self.is_folder(*names) else ()
        return ()


def look_at(path: str | os.PathLike[str] | Location) -> Location:
    """What is at ``path``.

    Raises:
        FormatError: nothing is, or it cannot be read.
    """
    if isinstance(path, Location):
        return path
    text = os.fspath(path)
    return look_in(place_of(text), text)


def look_in(place: Place, path: str) -> Location:
    """What is at a path of a place.

    NeMo calls a checkpoint of one file per rank ``checkpoints/x.ckpt`` though the files are
    ``checkpoints/mp_rank_00/x.ckpt`` and so on; the first rank's file is then what is there.

    Raises:
        FormatError: nothing is, or it cannot be read.
    """
    kind = place.kind(path)
    if kind == FOLDER:
        return Location(path, True, names=place.names(path), place=place)
    if kind == OTHER:
        raise FormatError("is not a regular file", path=path, expected="a file or directory that stays as it is")
    if kind is None:
        first = _first_rank(place, path)
        if first is None:
            raise place.nothing_at(path)
        return look_in(place, first)
    source = place.open(path)
    return Location(path, False, head=source.read(0, min(HEAD, source.size)), place=place)


def _first_rank(place: Place, path: str) -> str | None:
    folder, name = os.path.split(path)
    try:
        names = place.names(folder or ".") if name else ()
    except FormatError:
        return None
    ranks: Iterable[str] = (entry for entry in names if entry.startswith(("mp_rank_", "tp_rank_")))
    return next((file for rank in ranks if place.is_file(file := place.join(folder, rank, name))), None)


def file_of(path: str) -> str:
    """The local file or directory that a path leads to or into; the path itself where that is on no disk."""
    return place_of(path).on_disk(path) or path
