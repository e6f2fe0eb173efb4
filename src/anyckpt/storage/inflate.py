"""Random access to the contents of a deflate or gzip stream, in bounded memory.

Deflate can only be read from the start, so the state of the decompressor is kept every so often and a read
continues from the nearest kept state before it.  When there are too many, every other one is dropped.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from typing import Any

from anyckpt.errors import FormatError, UnsafeError
from anyckpt.identity import Identity
from anyckpt.storage.source import ByteSource

GZIP = 31
"""``wbits`` of a gzip stream."""
RAW = -15
"""``wbits`` of a deflated zip record."""

_SPACING = 4 << 20  # bytes of output between two kept states, at first
_KEPT = 128  # states kept; one takes about 48 KB
_INPUT = 64 << 10
_LARGEST_RATIO = 1032  # deflate cannot do better (zlib's technical details)


class _State:
    """A decompressor and where it stands: ``done`` bytes of output made of the input before ``position``."""

    __slots__ = ("decompressor", "done", "position")

    def __init__(self, decompressor: Any, position: int, done: int) -> None:
        self.decompressor = decompressor
        self.position = position
        self.done = done

    def copy(self) -> _State:
        return _State(self.decompressor.copy(), self.position, self.done)


class InflatedSource(ByteSource):
    """What a compressed source decompresses to.

    Args:
        base: the compressed bytes: one deflate stream, or one or more gzip members.
        size: decompressed bytes as the container states them, or None to find out by decompressing once.
        wbits: ``RAW`` or ``GZIP`` (as zlib's argument of that name).
        name: what to call it in a message.

    Raises:
        UnsafeError: the stated size is more than deflate can pack into ``base``.
        FormatError: ``size`` is None and the stream is damaged or truncated.  Otherwise reading raises it, also
            when there are more or fewer bytes than stated.
    """

    __slots__ = ("_base", "_kept", "_lock", "_spacing", "_state", "_wbits")

    def __init__(self, base: ByteSource, size: int | None, wbits: int, name: str | None = None) -> None:
        self._base = base
        self._wbits = wbits
        self._lock = threading.Lock()
        self._spacing = _SPACING
        self.name = base.name if name is None else name
        self.path = None
        self._state = self._begin()
        self._kept = [self._state.copy()]
        if size is None:
            self.size = 1 << 63
            while self._step(memoryview(bytearray(256 << 10))):
                pass
            self.size = self._state.done
        else:
            if size > (base.size + 1) * _LARGEST_RATIO:
                raise UnsafeError(
                    "a compressed record states a size that its bytes cannot hold",
                    path=self.name,
                    expected=f"at most {(base.size + 1) * _LARGEST_RATIO} bytes from {base.size}",
                    found=f"{size} bytes",
                )
            self.size = size

    def identity(self) -> Identity:
        return self._base, self._wbits, self.size

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process begins without states of the decompressor."""
        return type(self), (self._base, self.size, self._wbits, self.name)

    def _begin(self) -> _State:
        return _State(zlib.decompressobj(self._wbits), 0, 0)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            nearest = self._kept[bisect_right(self._kept, offset, key=lambda state: state.done) - 1]
            if not nearest.done <= self._state.done <= offset:
                self._state = nearest.copy()
            skipped = memoryview(bytearray(min(256 << 10, offset - self._state.done)))
            while self._state.done < offset:
                self._fill(skipped[: offset - self._state.done])
            self._fill(buffer)
            if self._state.done == self.size and self._step(memoryview(bytearray(1))):
                self._state = self._begin()
                raise FormatError("decompresses to more than it states", path=self.name, expected=f"{self.size} bytes")

    def _fill(self, buffer: memoryview) -> None:
        position = 0
        while position < len(buffer):
            count = self._step(buffer[position:])
            if not count:
                raise FormatError(
                    "decompresses to less than it states",
                    path=self.name,
                    expected=f"{self.size} bytes",
                    found=f"{self._state.done} bytes",
                    remedy="copy the checkpoint again from its origin",
                )
            position += count

    def _step(self, buffer: memoryview) -> int:
        """Decompress some bytes into ``buffer``; how many, or 0 at the end of the stream.

        Raises:
            FormatError: the stream is damaged or truncated.
        """
        state = self._state
        while True:
            if state.decompressor.eof and not self._next_member(state):
                return 0
            chunk = self._base.read(state.position, min(_INPUT, self._base.size - state.position))
            try:
                data = state.decompressor.decompress(chunk, len(buffer))
            except zlib.error as error:
                raise FormatError(
                    f"the compressed data is damaged near byte {state.position}: {error}",
                    path=self.name,
                    remedy="copy the checkpoint again from its origin",
                ) from error
            ended = state.decompressor.eof  # zlib then gives what is left by both names
            left = state.decompressor.unused_data if ended else state.decompressor.unconsumed_tail
            state.position += len(chunk) - len(left)
            if data:
                break
            if not chunk and not state.decompressor.eof:
                raise FormatError(
                    "the compressed data is truncated",
                    path=self.name,
                    remedy="copy the checkpoint again from its origin",
                )
        buffer[: len(data)] = data
        state.done += len(data)
        if state.done - self._kept[-1].done >= self._spacing:
            self._keep(state)
        return len(data)

    def _next_member(self, state: _State) -> bool:
        """Go on with the next gzip member; what follows the last one (padding) is ignored, as ``gzip`` does."""
        left = self._base.size - state.position
        if self._wbits != GZIP or left < 2 or self._base.read(state.position, 2) != b"\x1f\x8b":
            return False
        state.decompressor = zlib.decompressobj(self._wbits)
        return True

    def _keep(self, state: _State) -> None:
        self._kept.append(state.copy())
        if len(self._kept) > _KEPT:
            del self._kept[1::2]
            self._spacing *= 2
