"""The bytes of an object of a store, of which only the ranges that are asked for are read."""

from __future__ import annotations

from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnreachableError
from anyckpt.identity import Identity
from anyckpt.storage.read_count import count_read
from anyckpt.storage.remote.addresses import Address
from anyckpt.storage.remote.requesting import WrongAnswerError, told
from anyckpt.storage.remote.stores import Store, store_at
from anyckpt.storage.source import ByteSource

AT_ONCE = 32
"""Reads of far objects worth making together: their round trips are waited for, and a link fills with several."""

_CHUNK = 64 << 10


@dataclass(frozen=True)
class Stamp:
    """What tells an object from another that is put in its place.

    Attributes:
        size: bytes.
        tag: its entity tag without quotes; empty where the server gives none.
        modified: when it was written, in the server's words; empty where it does not say.
    """

    size: int
    tag: str
    modified: str

    @classmethod
    def of(cls, meta: Any) -> Stamp:
        """From obstore's ``ObjectMeta``: a listing and an answer may quote the tag otherwise."""
        tag = (meta["e_tag"] or "").removeprefix("W/").strip('"')
        modified = meta["last_modified"]  # the beginning of time where the server does not say
        return cls(int(meta["size"]), tag, str(modified) if modified and modified.timestamp() else "")

    def differs(self, other: Stamp) -> bool:
        if self.size != other.size:
            return True
        return self.tag != other.tag if self.tag and other.tag else self.modified != other.modified

    def __str__(self) -> str:
        return f"{self.size:,} bytes, " + (
            f"tag {self.tag}" if self.tag else f"written {self.modified or 'at an unknown time'}"
        )


class ObjectSource(ByteSource):
    """An object, whose every answer must be of the version that was listed.

    Args:
        store: of obstore.
        address: where the object is.
        stamp: what it was when it was found.
    """

    __slots__ = ("_address", "_stamp", "_store")

    def __init__(self, store: Store, address: Address, stamp: Stamp) -> None:
        self.name = address.public
        self.path = None
        self.size = stamp.size
        self._store = store
        self._address = address
        self._stamp = stamp

    @property
    def at_once(self) -> int:
        return AT_ONCE

    def identity(self) -> Identity:
        return self.name, self.size, self._stamp.tag or self._stamp.modified

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process finds the store itself: only what an address was given with travels, no other credentials."""
        return _again, (self._address, self._stamp)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0

        def ask() -> None:
            nonlocal done
            answer = self._store.get(self._address.key, options={"range": (offset + done, offset + len(buffer))})
            self._check(Stamp.of(answer.meta))
            if tuple(answer.range) != (offset + done, offset + len(buffer)):
                raise WrongAnswerError("the server sends other parts than those asked for")
            for chunk in answer.stream(min_chunk_size=_CHUNK):
                data = memoryview(chunk)
                if done + len(data) > len(buffer):
                    raise WrongAnswerError("the server sends more than was asked for")
                buffer[done : done + len(data)] = data
                done += len(data)
            if done < len(buffer):
                raise WrongAnswerError("the answer broke off")

        try:
            told(self._store, self._address, self.name, ask)
        except _ChangedError as error:
            found = error.found
        except FormatError as error:  # it was there a moment ago: nobody may take it for missing
            raise error.told_as(UnreachableError) from None
        else:
            count_read(len(buffer))
            return
        raise UnreachableError(
            "changed while it was being read",
            path=self.name,
            expected=self._stamp,
            found=found,
            remedy="run it again when nothing writes to the source",
        )

    def _check(self, found: Stamp) -> None:
        if self._stamp.differs(found):
            raise _ChangedError(found)


class _ChangedError(BaseException):
    """Another object is in the place of the one that was found; no error of a request, which would be tried again."""

    def __init__(self, found: Stamp) -> None:
        super().__init__()
        self.found = found


def _again(address: Address, stamp: Stamp) -> ObjectSource:
    return ObjectSource(store_at(address), address, stamp)
