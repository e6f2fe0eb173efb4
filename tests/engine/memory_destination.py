"""A destination that is no file system, to prove that the engine asks for no more than an object store gives.

Parts of an object go up one after another; it is there when its upload is completed, and never changes.  Uploads that
are not completed can be continued by another process that knows of them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.files import Bytes
from anyckpt.engine.plan import Plan
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.errors import OutputError


@dataclass
class ObjectStore:
    """What outlives a process.

    Attributes:
        objects: complete ones by name.
        sealed: their names in the order of completion.
        uploads: parts so far, of objects that are not complete.
        notes: what processes noted of durable blocks, as text, as it would be kept.
        fail_after: refuse every request after so many.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    sealed: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fail_after: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def request(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise OutputError("the store does not answer", path="memory")


class MemoryDestination(Destination):
    in_order = True

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.name = name
        self.store = store
        self.plan = Plan("", ())
        self.pending: dict[int, bytearray] = {}
        self.busy: dict[int, int] = {}

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        if "manifest" in self.store.objects:
            raise OutputError("already exists", path=self.name)
        self.plan = plan
        if share is None and not resume:
            self.store.uploads.clear()
            self.store.notes.clear()
        known = {file for file, _ in self.records(fingerprint)}
        for number, file in enumerate(plan.files):
            if number not in known and file.path not in self.store.objects:
                self.store.uploads.pop(file.path, None)

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        found: dict[BlockKey, BlockRecord] = {}
        for note in self.store.notes:
            file, offset, crcs, digests = json.loads(note)
            found[file, offset] = BlockRecord([tuple(c) for c in crcs], [tuple(d) for d in digests])
        return found

    def write(self, file: int, offset: int, data: Bytes) -> None:
        self.store.request()
        path = self.plan.files[file].path
        if file not in self.busy:  # parts that went up and were not noted are replaced
            self.store.uploads[path] = self.store.uploads.get(path, b"")[:offset]
        assert self.busy.setdefault(file, threading.get_ident()) == threading.get_ident()
        assert path not in self.store.objects, f"{path} is complete"
        there = len(self.store.uploads.get(path, b""))
        waiting = self.pending.setdefault(file, bytearray())
        assert offset == there + len(waiting), f"{path} is not written in order"
        waiting += data.tobytes()

    def sync(self, files: Collection[int]) -> None:
        with self.store.lock:
            for file in files:
                if file in self.pending:
                    self.store.request()
                    path = self.plan.files[file].path
                    self.store.uploads[path] = self.store.uploads.get(path, b"") + bytes(self.pending.pop(file))

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        with self.store.lock:
            self.store.request()
            self.store.notes += [json.dumps(record.to_row(key)) for key, record in blocks.items()]

    def seal(self, files: Collection[int]) -> None:
        self.sync(files)
        with self.store.lock:
            for number in files:
                file = self.plan.files[number]
                if file.path not in self.store.objects:
                    self.store.request()
                    data = self.store.uploads.pop(file.path, b"")
                    assert len(data) == file.nbytes, f"{file.path} is not whole"
                    self.store.objects[file.path] = data
                    self.store.sealed.append(file.path)

    def publish(self, manifest: bytes) -> None:
        assert all(file.path in self.store.objects for file in self.plan.files)
        self.store.objects["manifest"] = manifest

    def is_published(self, fingerprint: str) -> bool:
        found: Any = self.store.objects.get("manifest")
        return found is not None and json.loads(found)["plan"] == fingerprint

    def close(self, failure: str = "") -> None:
        self.pending.clear()

    def discard(self) -> None:
        self.store.uploads.clear()
        self.store.notes.clear()
