"""Files of a repository, read by ranges.

The Hub answers for small files itself, and for large ones with the address of its storage, signed for a while
(``resolve``, with ``302``).  That address is asked for once, used by all reads of the file, and asked for again when
the storage takes it no more.  The token goes to the Hub alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, FormatError, UnreachableError
from anyckpt.identity import Identity
from anyckpt.storage.hub import library
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.read_count import count_read
from anyckpt.storage.source import ByteSource

if TYPE_CHECKING:
    from anyckpt.storage.hub.repository import Entry, Repository

AT_ONCE = 16
_TRIES = 6
_REDIRECTS = 5
_MOST_SKIPPED = 1 << 20
"""Bytes that are read for nothing where an answer begins at the file's start, whatever was asked for."""

_EXPIRED = frozenset((400, 401, 403, 404, 410))
"""What storages answer to an address whose signature has run out."""


@dataclass(frozen=True)
class _Holder:
    """Where a file can be had: of the Hub, which wants the token, or of a storage, which has a signed address."""

    address: str
    is_hub: bool


@dataclass(frozen=True)
class _Answer:
    """To a request for a range; headers by names in any letters."""

    status: int
    told: Mapping[str, str]
    body: Iterator[bytes]
    of_hub: bool

    @property
    def refers(self) -> bool:
        """Whether it names another address."""
        return 300 <= self.status < 400

    @property
    def has_bytes(self) -> bool:
        return self.status in (200, 206)

    @property
    def is_long(self) -> bool:
        """Whether it is the whole of a large file, though a range was asked for."""
        return self.status == 200 and int(self.told.get("content-length") or _MOST_SKIPPED) >= _MOST_SKIPPED

    def end(self) -> None:
        """Take what is left of it, as the connection is of no more use otherwise."""
        if not self.is_long:
            for _ in self.body:
                pass

    def refusal(self, path: str) -> AnyckptError:
        """What it means if it has no bytes."""
        if self.of_hub:
            return library.answered(self.status, self.told, path)
        return UnreachableError(
            f"the Hub's storage answers with HTTP {self.status}", path=path, remedy="try again later"
        )


class _PassingError(Exception):
    """An answer that may be another a moment later."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class HubFile(ByteSource):
    """A file of a repository at one commit; read from huggingface_hub's cache where that has it.

    Args:
        repository: that it is in.
        inner: its name there.
        entry: what the Hub says of it.
    """

    __slots__ = ("_cached", "_entry", "_holder", "_inner", "_lock", "_repository")

    def __init__(self, repository: Repository, inner: str, entry: Entry) -> None:
        self.name = f"{repository.path.root}/{inner}"
        self.path = None
        self.size = entry.size
        self._repository = repository
        self._inner = inner
        self._entry = entry
        self._lock = threading.Lock()
        self._holder: _Holder | None = None
        self._cached: LocalFile | bool | None = None

    def identity(self) -> Identity:
        """The commit, and the digest of the contents."""
        path = self._repository.path
        return path.kind, path.repository, self._repository.commit, self._inner, self.size, self._entry.digest

    def __reduce__(self) -> tuple[Any, ...]:
        return HubFile, (self._repository, self._inner, self._entry)

    @property
    def at_once(self) -> int:
        return 1 if self._in_cache() else AT_ONCE

    def _in_cache(self) -> LocalFile | None:
        """The file in huggingface_hub's cache, if it is there, whole."""
        if self._cached is None:
            local = self._repository.cached(self._inner)
            found = None if local is None else LocalFile(local)
            self._cached = found if found is not None and found.size == self.size else False
        return self._cached if isinstance(self._cached, LocalFile) else None

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        local = self._in_cache()
        if local is not None:
            local.read_through(offset, buffer)
            return
        if library.is_offline():
            raise library.offline(self.name)
        filled = 0
        for tried in range(1, _TRIES + 1):
            told: Mapping[str, str] | None = None
            try:
                for count in self._filling(offset + filled, buffer[filled:]):
                    filled += count
                count_read(len(buffer))
                return
            except _PassingError as trouble:
                if tried == _TRIES:
                    raise trouble.answer.refusal(self.name) from None
                told = trouble.answer.told
            except library.failures() as error:
                if tried == _TRIES or not library.passes(error):
                    raise library.explained(error, self.name) from None
            library.pause(tried, told)

    def _filling(self, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill a buffer; yields the numbers of bytes as they come."""
        filled = 0
        with self._answer(start, len(buffer)) as answer:
            if answer.status == 206:
                self._check_range(answer.told.get("content-range", ""), start)
            elif answer.status != 200 or start > _MOST_SKIPPED:
                self._refuse(answer)
            left_out = start if answer.status == 200 else 0
            for data in answer.body:
                taken = data[left_out:]
                left_out -= len(data) - len(taken)
                taken = taken[: len(buffer) - filled]
                buffer[filled : filled + len(taken)] = taken
                filled += len(taken)
                yield len(taken)
                if filled == len(buffer) and answer.is_long:
                    return
        if filled < len(buffer):
            raise ConnectionError("the answer ended before its time")

    @contextmanager
    def _answer(self, start: int, length: int) -> Iterator[_Answer]:
        """What whoever has the file says to a range; one thread asks the Hub who that is, and others wait for it."""
        with ExitStack() as stack:
            known = self._holder
            if known is not None:
                answer = stack.enter_context(self._ask(known, start, length))
                if not (answer.refers or answer.status in _EXPIRED):
                    yield answer
                    return
                answer.end()
                stack.close()
            found = None
            with self._lock:
                if self._holder is known or self._holder is None:
                    self._holder, found = self._find(stack, start, length)
                holder = self._holder
            if found is None:
                assert holder is not None
                found = stack.enter_context(self._ask(holder, start, length))
            yield found

    @contextmanager
    def _ask(self, holder: _Holder, start: int, length: int) -> Iterator[_Answer]:
        carried = library.headers() if holder.is_hub else {}
        wanted = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with library.streamed(holder.address, {**carried, **wanted}) as (status, told, body):
            yield _Answer(status, told, body, holder.is_hub)

    def _find(self, stack: ExitStack, start: int, length: int) -> tuple[_Holder | None, _Answer | None]:
        """Who has the file; and the answer to the range if it is the Hub itself, which stays open with ``stack``."""
        holder = _Holder(self._repository.address(self._inner), True)
        origin = urlsplit(holder.address)[:2]
        for _ in range(_REDIRECTS):
            answer = stack.enter_context(self._ask(holder, start, length))
            if not answer.refers:
                return (holder if answer.has_bytes else None), answer
            self._check_size(answer.told.get("x-linked-size"))
            address = urljoin(holder.address, answer.told.get("location", ""))
            answer.end()
            stack.close()
            holder = _Holder(address, urlsplit(address)[:2] == origin)
            if not holder.is_hub:
                return holder, None
        raise FormatError("the Hub refers from one address to another without an end", path=self.name)

    def _check_range(self, told: str, start: int) -> None:
        span, _, total = told.removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(start):
            raise ConnectionError(f"the answer is of other bytes: {told}")
        self._check_size(total)

    def _check_size(self, total: str | None) -> None:
        if total is not None and total.isdecimal() and int(total) != self.size:
            raise UnreachableError(
                "is of another size than the Hub's list of files says",
                path=self.name,
                expected=f"{self.size} bytes",
                found=f"{total} bytes",
            )

    def _refuse(self, answer: _Answer) -> None:
        """Raise what an answer without bytes means."""
        if library.is_passing(answer.status, answer.told):
            raise _PassingError(answer)
        raise answer.refusal(self.name)
