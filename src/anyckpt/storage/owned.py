"""Bytes that one of several processes has, such as its part of live state; the others know all but the contents."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from anyckpt.errors import UsageError
from anyckpt.identity import Identity
from anyckpt.storage.source import ByteSource


class OwnedSource(ByteSource):
    """A part of what all processes together write, which one of them supplies.

    Every process describes all parts alike, so that all make one plan; only the owner gives the bytes.

    Args:
        owner: the number of the share that its process writes, from 1.
        key: plain values that name the contents in every process, and never others: a step, a tensor, a place in it.
        size: bytes.
        data: the bytes, in the owner's process; None elsewhere.
        name: what to call it in a message.

    Raises:
        UsageError: the data has another size.
    """

    __slots__ = ("_data", "_key", "_owner")

    def __init__(self, owner: int, key: Identity, size: int, data: ByteSource | None, name: str) -> None:
        if data is not None and data.size != size:
            raise UsageError("a part has another size than planned", path=name, expected=size, found=data.size)
        self._owner = owner
        self._key = key
        self._data = data
        self.name = name
        self.path = None
        self.size = size

    def identity(self) -> Identity:
        return self._owner, self._key, self.size

    def owner(self) -> int:
        return self._owner

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        if self._data is None:
            yield self, offset, length
        else:
            yield from self._data.wanted(offset, length)

    def sent_to(self, share: int | None) -> tuple[Any, ...]:
        """As ``__reduce__``, for the process that writes a share (all if None), which gets nothing else."""
        data = self._data if share in (None, self._owner) else None
        return type(self), (self._owner, self._key, self.size, data, self.name)

    def place(self) -> tuple[Hashable, int]:
        return ("owned", self._owner, self._key), 0

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        if self._data is None:
            raise UsageError(
                "is held by another process",
                path=self.name,
                expected=f"the process of share {self._owner}",
                remedy="let that process write its share",
            )
        self._data.read_into(offset, buffer)
