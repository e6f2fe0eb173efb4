"""Objects of an output that are being written: small ones in memory, others as uploads."""

from __future__ import annotations

import threading
from collections.abc import Collection

from anyckpt.engine.plan import Plan
from anyckpt.storage.objects import PART_BYTES, ConflictError, Objects, Upload

_HELD_BYTES = 16 << 20
"""So many bytes of small objects that wait are in memory; more of them wait as uploads that are not finished."""

_PARTS_IN_FLIGHT = 8
"""Parts on their way when few files are written at once."""


class Growing:
    """Files of a plan as far as they are written, each by one thread at a time.

    Args:
        objects: the store.
        plan: what is written.
        waiting: indices of files that are not finished before the output is published.
    """

    def __init__(self, objects: Objects, plan: Plan, waiting: Collection[int]) -> None:
        self._objects = objects
        self._plan = plan
        large = sum(file.nbytes > PART_BYTES for file in plan.files)
        self._at_once = max(2, _PARTS_IN_FLIGHT // max(1, large))
        self._waiting = frozenset(waiting)
        self._lock = threading.Lock()
        self._small: dict[int, bytearray] = {}
        self._uploads: dict[int, Upload] = {}
        self._held = 0

    def write(self, number: int, key: str, data: bytes) -> None:
        """Add bytes to a file.

        Args:
            number: which.
            key: of its object.
            data: what follows the bytes that it has.

        Raises:
            OutputError: the store refuses.
        """
        with self._lock:
            small, upload = self._small.get(number), self._uploads.get(number)
            if small is None and upload is None:
                small = self._begun_small(number)
        if small is not None:
            small += data
            return
        if upload is None:
            upload = self._objects.upload(key, self._plan.files[number].nbytes, self._at_once)
            with self._lock:
                self._uploads[number] = upload
        upload.write(data)

    def _begun_small(self, number: int) -> bytearray | None:
        nbytes = self._plan.files[number].nbytes
        waits = number in self._waiting
        if nbytes > PART_BYTES or (waits and self._held + nbytes > _HELD_BYTES):
            return None
        self._held += nbytes if waits else 0
        return self._small.setdefault(number, bytearray())

    def finish(self, number: int, key: str, *, new: bool = False, before: str = "") -> str:
        """Let a file appear; its tag.

        Args:
            number: which.
            key: of its object.
            new: only if there is none, as far as the store can make sure of that.
            before: the tag of the object that was there when the work began; empty if none was.

        Raises:
            ConflictError: there is one.
            OutputError: the store refuses.
        """
        with self._lock:
            small, upload = self._small.pop(number, None), self._uploads.get(number)
        if upload is None:
            return self._objects.put(key, bytes(small or b""), new=new)
        if new and self._objects.facts(key) is not None:
            raise ConflictError(key)
        tag = upload.finish(before)
        with self._lock:
            del self._uploads[number]
        return tag

    def abandon(self) -> None:
        """Give up what is not finished."""
        with self._lock:
            uploads = list(self._uploads.values())
            self._uploads.clear()
            self._small.clear()
        for upload in uploads:
            upload.abandon()
