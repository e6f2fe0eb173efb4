"""An object store in memory, whose requests can be counted and from whose k-th on a writer is dead."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from anyckpt.errors import OutputError
from anyckpt.storage.objects import (
    MOST_PARTS,
    ConflictError,
    ObjectFacts,
    Objects,
    UnfinishedUpload,
    Upload,
    part_bytes,
)


class DeadError(BaseException):
    """What a writer meets that is killed: nothing catches it, and no later request of it arrives."""


@dataclass
class Store:
    """What outlives a writer.

    Attributes:
        objects: contents and tags by key.
        uploads: how many are not finished.
        conditions: whether it knows conditional requests.
    """

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    uploads: int = 0
    conditions: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)
    tags: itertools.count[int] = field(default_factory=itertools.count)

    def put(self, key: str, data: bytes) -> str:
        tag = f'"{next(self.tags)}"'
        self.objects[key] = (data, tag)
        return tag

    def below(self, key: str) -> dict[str, bytes]:
        """The contents of a folder by name."""
        return {name[len(key) + 1 :]: data for name, (data, _) in self.objects.items() if name.startswith(f"{key}/")}


class MemoryObjects(Objects):
    """One writer's way to a store.

    Args:
        store: the store.
        dies_at: number of the request that the writer is killed in; it never is if None.
        fails_at: number of the request that the store refuses.
    """

    root = "mem://bucket/"

    def __init__(self, store: Store, dies_at: int | None = None, fails_at: int | None = None) -> None:
        self.store = store
        self.requests: list[str] = []
        self._dies_at = dies_at
        self._fails_at = fails_at

    def request(self, what: str) -> None:
        with self.store.lock:
            number = len(self.requests)
            self.requests.append(what)
        if self._dies_at is not None and number >= self._dies_at:
            raise DeadError
        if number == self._fails_at:
            raise OutputError("the store fails", path=self.root)

    def listed(self, prefix: str) -> dict[str, ObjectFacts]:
        self.request(f"list {prefix}")
        with self.store.lock:
            found = {key: value for key, value in self.store.objects.items() if key.startswith(f"{prefix}/")}
        return {key: _facts(data, tag) for key, (data, tag) in found.items()}

    def facts(self, key: str) -> ObjectFacts | None:
        self.request(f"head {key}")
        found = self.store.objects.get(key)
        return None if found is None else _facts(*found)

    def read(self, key: str) -> tuple[bytes, str] | None:
        self.request(f"get {key}")
        return self.store.objects.get(key)

    def put(self, key: str, data: bytes, *, new: bool = False, instead_of: str | None = None) -> str:
        self.request(f"put {key}")
        with self.store.lock:
            found = self.store.objects.get(key)
            other = (new and found is not None) or (instead_of and (found is None or found[1] != instead_of))
            if self.store.conditions and other:
                if found is None or found[0] != data:
                    raise ConflictError(key)
                return found[1]
            return self.store.put(key, data)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.request(f"delete {key}")  # a batch is not deleted at once
            with self.store.lock:
                self.store.objects.pop(key, None)

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        return []

    def forget(self, upload: UnfinishedUpload) -> None:
        raise AssertionError("no unfinished upload was told of")

    def upload(self, key: str, nbytes: int, at_once: int) -> Upload:
        self.request(f"begin {key}")
        return _MemoryUpload(self, key, nbytes)


class _MemoryUpload(Upload):
    def __init__(self, objects: MemoryObjects, key: str, nbytes: int) -> None:
        self._objects = objects
        self._key = key
        self._nbytes = nbytes
        self._data = bytearray()
        objects.store.uploads += 1

    def write(self, data: bytes) -> None:
        self._objects.request(f"part {self._key}")
        self._data += data

    def finish(self, before: str = "") -> str:
        self._objects.request(f"finish {self._key}")
        assert len(self._data) == self._nbytes, f"{self._key} is not whole"
        assert -(-self._nbytes // part_bytes(self._nbytes)) <= MOST_PARTS
        with self._objects.store.lock:
            self._objects.store.uploads -= 1
            return self._objects.store.put(self._key, bytes(self._data))

    def abandon(self) -> None:
        self._objects.store.uploads -= 1


def _facts(data: bytes, tag: str) -> ObjectFacts:
    return ObjectFacts(len(data), tag, datetime.now(timezone.utc))
