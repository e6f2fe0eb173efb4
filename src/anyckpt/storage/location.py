"""A location, which is a path in a place, and how the place of a path is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.folder import Folder
from anyckpt.storage.heads import EDGE, edges
from anyckpt.storage.members import SEPARATOR
from anyckpt.storage.place import FOLDER, LOCAL, OTHER, Place, scheme_of
from anyckpt.storage.requests import holding
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tree import ArchivePlace

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted

HEAD = 512
"""Bytes of a file that a location shows."""

_SMALL_FILES = 256
_SMALL_BYTES = 4 << 20


def _on_the_hub(path: str) -> Place:
    from anyckpt.storage.hub.place import hub_place  # here, as are the others, so that local paths need none of them

    return hub_place(path)


def _remote(path: str) -> Place:
    from anyckpt.storage.remote.places import place_at

    return place_at(path)


SCHEMES: dict[str, Callable[[str], Place]] = {
    "hf": _on_the_hub,
    **dict.fromkeys(("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "https", "http"), _remote),
}
"""What makes the place of a path that begins with ``scheme://``, from the path."""


def place_of(path: str) -> Place:
    """The place that a path is in; of archives that it leads into, those that hold others are opened.

    Raises:
        FormatError: what should be an archive is none, or holds no such archive.
        UnsafeError: see ``ArchivePlace``.
    """
    return _place_and_path(path)[0]


def _place_and_path(path: str) -> tuple[Place, str]:
    """The place of a path, and the path as it may be shown."""
    scheme = scheme_of(path)
    place = SCHEMES[scheme](path) if scheme in SCHEMES else LOCAL
    path = place.shown(path)
    if SEPARATOR not in path or place.exists(path):
        return place, path
    parts = path.split(SEPARATOR)
    for count in range(len(parts) - 1, 0, -1):
        file = SEPARATOR.join(parts[:count])
        if place.is_file(file):
            return _into(place, file, parts[count:]), path
    return place, path


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


def public_path(path: str | os.PathLike[str]) -> str:
    """A path as it may be shown and kept, under which it is found again in this process; see ``Place.shown``."""
    text = os.fspath(path)
    scheme = scheme_of(text)
    return SCHEMES[scheme](text).shown(text) if scheme in SCHEMES else text


def look_at(path: str | os.PathLike[str] | Location) -> Location:
    """What is at ``path``.

    Raises:
        FormatError: nothing is, or it cannot be read.
    """
    if isinstance(path, Location):
        return path
    return look_in(*_place_and_path(os.fspath(path)))


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
    place, shown = _place_and_path(path)
    return place.on_disk(shown) or shown


def root_of(path: str) -> str:
    """The file or folder that a path leads to or into, as files in it begin; see ``name_below``."""
    file = file_of(path)
    return os.path.abspath(file) if scheme_of(file) is None else file.rstrip("/")


def name_below(root: str, file: str) -> str:
    """What a file is called in the folder ``root``; of ``root`` itself its name, of a file elsewhere its path."""
    if file == root:
        return os.path.basename(file)
    return file[len(root) + 1 :] if file.startswith(f"{root}/") else file


def disk_file_of(path: str) -> str | None:
    """The local file or directory that a path leads to or into, as ``look_in`` finds it; None if that is on no disk."""
    place = place_of(path)
    found = place.on_disk(path)
    return found if found is None or place.exists(path) else look_in(place, path).on_disk


@contextmanager
def small_files(location: Location) -> Iterator[None]:
    """Within, the small files of a far folder are held: its settings and markers, which several formats look at.

    Of a file, the two ends are.
    """
    wanted: list[Wanted] = []
    left = _SMALL_BYTES
    if location.place.is_far and location.is_directory:
        for name in location.names[:_SMALL_FILES]:
            source = location.open(name) if location.is_file(name) else None
            if source is not None and source.size <= min(EDGE, left):
                wanted.append((source, 0, source.size))
                left -= source.size
    elif location.place.is_far:
        wanted = edges(location.open())
    with holding(wanted):
        yield
