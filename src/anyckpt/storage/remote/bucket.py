"""Buckets as places: a folder is what keys have in common."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import field, replace
from itertools import islice

from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, FormatError, UnreachableError, did_you_mean, few
from anyckpt.storage.folder import Folder, check_inside
from anyckpt.storage.place import FILE, FOLDER, Place
from anyckpt.storage.remote.addresses import address_of
from anyckpt.storage.remote.failures import Failure, named
from anyckpt.storage.remote.requesting import asked, told
from anyckpt.storage.remote.source import ObjectSource, Stamp
from anyckpt.storage.remote.stores import Store, is_anonymous, store_at
from anyckpt.storage.source import ByteSource

MOST_FLAT = 20_000
"""Objects of one listing with all folders in it: beyond that, folders are listed one by one, as they are needed."""

_MOST = 2_000_000
_PAGE = 1_000


@dataclass
class _Level:
    """What is right in a folder: files, and names of folders."""

    files: dict[str, Stamp] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


class BucketPlace(Place):
    """The objects of a bucket or container, as found when they were first asked for.

    What is below the path that it was made for is listed at once, whatever its folders; of everything else only the
    folder that is asked for.

    Args:
        path: of the checkpoint.
    """

    is_far = True

    def __init__(self, path: str) -> None:
        self._address = address_of(path)
        self._store: Store = store_at(self._address)
        self._levels: dict[str, _Level] = {}
        self._whole: set[str] = set()
        self._denied: dict[str, FormatError] = {}
        self._sources: dict[str, ByteSource] = {}
        self._lock = threading.RLock()

    def kind(self, path: str) -> str | None:
        key = address_of(path).key
        with self._lock:
            if key != self._address.key:
                return self._kind_by_listing(key)
            if "." in key.rpartition("/")[2]:  # likely a file: one request, not two
                return FILE if self._is_object(key) else self._folder(key)
            return self._folder(key) or (FILE if self._is_object(key) else None)

    def _folder(self, key: str) -> str | None:
        level = self._level(key)
        return FOLDER if level.files or level.folders else None

    def _kind_by_listing(self, key: str) -> str | None:
        """What a listing of the folder above tells, or one of a folder farther up, if that is known."""
        above, _, name = key.rpartition("/")
        if not name:
            return FOLDER
        if key in self._sources:
            return FILE
        if self._is_known_missing(above):
            return None
        try:
            level = self._level(above)
        except FormatError:  # who may not list a folder may well read files in it
            return FILE if self._is_object(key) else None
        return FOLDER if name in level.folders else FILE if name in level.files else None

    def _is_known_missing(self, key: str) -> bool:
        """Whether what has been listed tells that there is no such folder."""
        while key and key not in self._levels:
            above, _, name = key.rpartition("/")
            if above in self._levels:
                return name not in self._levels[above].folders
            key = above
        return False

    def _is_object(self, key: str) -> bool:
        """Ask for one object."""
        if key not in self._sources and key:
            found = asked(lambda: self._store.head(key))
            if isinstance(found, Failure):
                if not found.is_missing:
                    raise self._error(found, key)
                return False
            self._sources[key] = self._source(key, Stamp.of(found))
        return key in self._sources

    def _error(self, failure: Failure, key: str) -> AnyckptError:
        return named(failure, self._address, self._address.path_of(key), unsigned=is_anonymous(self._store))

    def _source(self, key: str, stamp: Stamp) -> ByteSource:
        return ObjectSource(self._store, replace(self._address, key=key), stamp)

    def _level(self, key: str) -> _Level:
        """What is right in a folder; nothing if there is none.

        Raises:
            FormatError: it may not be listed.
            UnreachableError: it cannot be listed at this moment.
        """
        with self._lock:
            if key in self._denied:
                raise self._denied[key]
            if key not in self._levels:
                root = self._address.key
                if root in self._whole and key.startswith(f"{root}/" if root else ""):
                    return _Level()
                try:
                    if not (key == self._address.key and self._listed_whole(key)):
                        self._list(key)
                except FormatError as error:
                    self._denied[key] = error
                    raise
            return self._levels[key]

    def _listed_whole(self, key: str) -> bool:
        """List a folder and all below it; whether those were not too many."""

        def ask() -> list[tuple[str, Stamp]]:
            pages = self._store.list(key or None, chunk_size=_PAGE)
            return list(islice(((found["path"], Stamp.of(found)) for page in pages for found in page), MOST_FLAT + 1))

        objects = told(self._store, self._address, self._address.path_of(key), ask)
        if len(objects) > MOST_FLAT:
            return False
        levels = {key: _Level()}
        for path, stamp in objects:
            above, _, name = path.rpartition("/")
            if path == key or not name:  # what consoles make of an empty folder
                continue
            levels.setdefault(above, _Level()).files[name] = stamp
            while above != key and above:
                above, _, name = above.rpartition("/")
                levels.setdefault(above, _Level()).folders.add(name)
        for level in levels.values():
            for name in level.folders & level.files.keys():
                if not level.files[name].size:
                    del level.files[name]
        self._levels.update(levels)
        self._whole.add(key)
        return True

    def _list(self, key: str) -> None:
        def ask() -> _Level:
            found = self._store.list_with_delimiter(key or None)
            last = [path.rpartition("/")[2] for path in found["common_prefixes"]]
            files = {
                meta["path"].rpartition("/")[2]: Stamp.of(meta) for meta in found["objects"] if meta["path"] != key
            }
            folders = set(last)
            return _Level({name: stamp for name, stamp in files.items() if name not in folders or stamp.size}, folders)

        self._levels[key] = told(self._store, self._address, self._address.path_of(key), ask)

    def names(self, path: str) -> tuple[str, ...]:
        key = address_of(path).key
        level = self._level(key)
        if not (level.files or level.folders):
            raise self.nothing_at(path)
        return tuple(sorted(level.folders | level.files.keys()))

    def open(self, path: str) -> ByteSource:
        key = address_of(path).key
        with self._lock:
            if key not in self._sources:
                if self.kind(path) != FILE:
                    raise self.nothing_at(path)
                if key not in self._sources:
                    above, _, name = key.rpartition("/")
                    self._sources[key] = self._source(key, self._levels[above].files[name])
            return self._sources[key]

    def below(self, key: str) -> list[str]:
        """Every file in a folder and below it, relative to it; sorted.

        Raises:
            FormatError: it has too many.
        """
        found: list[str] = []
        todo = [""]
        while todo:
            prefix = todo.pop()
            level = self._level("/".join(filter(None, (key, prefix.rstrip("/")))))
            found += [prefix + name for name in level.files]
            todo += [f"{prefix}{name}/" for name in level.folders]
            if len(found) > _MOST:
                raise FormatError(
                    "holds too many objects to be a checkpoint",
                    path=self._address.path_of(key),
                    expected=f"at most {_MOST:,}",
                    remedy="give the path of one checkpoint",
                )
        return sorted(found)

    def folder(self, path: str) -> Folder:
        return _BucketFolder(self, address_of(path).key, path)

    def join(self, path: str, *names: str) -> str:
        parts = (part.strip("/") for part in (address_of(path).key, *names))
        return self._address.path_of("/".join(filter(None, parts)))

    def split(self, path: str) -> tuple[str | None, str]:
        key = address_of(path).key
        above, _, name = key.rpartition("/")
        return (self._address.path_of(above), name) if key else (None, self._address.holder)

    def nothing_at(self, path: str) -> FormatError:
        address = address_of(path)
        found: Sequence[str] = ()
        above, _, name = address.key.rpartition("/")
        with suppress(FormatError, UnreachableError):
            level = self._level(above)
            found = sorted(level.folders | level.files.keys())
        return FormatError(
            "does not exist",
            path=address.public,
            found=few(found) + f" in {self._address.path_of(above)}" if found else None,
            remedy=did_you_mean(name, {one: one for one in found[:_PAGE]}) or "check the path",
        )


class _BucketFolder:
    """A folder of a bucket, as the ``Folder`` protocol says."""

    def __init__(self, place: BucketPlace, key: str, name: str) -> None:
        self.name = name
        self._place = place
        self._key = key
        self._names: list[str] | None = None

    def names(self) -> Sequence[str]:
        if self._names is None:
            self._names = self._place.below(self._key)
        return self._names

    def open(self, name: str) -> ByteSource:
        return self._place.open(self._place.join(self.name, check_inside(name, self.name)))
