"""Checksums gathered block by block, in any order.

A container's CRC-32 is joined from the CRCs of its blocks.  A tensor's digest in the manifest is
``xxh3_128`` over the concatenated 8-byte little-endian ``xxh3_64`` digests of its 4 MiB chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash
from isal import isal_zlib

if TYPE_CHECKING:
    from anyckpt.engine.records import BlockRecord

CHUNK_BYTES = 4 << 20
"""Bytes per chunk; on a 2-core machine 4 MiB moved faster than 1, 16 or 64 (docs/performance.md)."""

DIGEST = "xxh3-128 of xxh3-64 per 4 MiB"


def crc32(data: Any, before: int = 0) -> int:
    """CRC-32 of a buffer, as zip files have it; of what came before and the buffer, if ``before`` is its CRC-32."""
    return int(isal_zlib.crc32(data, before))


def chunk_digest(data: Any) -> int:
    """Digest of one chunk."""
    return xxhash.xxh3_64_intdigest(data)


def join_crc32(pieces: Mapping[int, tuple[int, int]]) -> int:
    """CRC-32 of a part from those of its pieces.

    Args:
        pieces: first byte in the part -> (CRC-32, length).
    """
    total = 0
    for start in sorted(pieces):
        crc, length = pieces[start]
        total = int(isal_zlib.crc32_combine(total, crc, length))
    return total


def join_digests(chunks: Mapping[int, int]) -> str:
    """Digest of a tensor, as hexadecimal text, from those of its chunks.

    Args:
        chunks: first byte in the tensor -> digest.
    """
    listed = b"".join([chunks[start].to_bytes(8, "little") for start in sorted(chunks)])
    return xxhash.xxh3_128_hexdigest(listed)


class PartSums:
    """Checksums of the parts of one file, from those of its blocks, which are added in any order."""

    def __init__(self) -> None:
        self._crcs: dict[int, dict[int, tuple[int, int]]] = {}
        self._digests: dict[int, dict[int, int]] = {}

    def add(self, record: BlockRecord) -> None:
        for part, start, crc, length in record.crcs:
            self._crcs.setdefault(part, {})[start] = (crc, length)
        for part, start, digest in record.digests:
            self._digests.setdefault(part, {})[start] = digest

    def crc32(self, part: int) -> int:
        """The CRC-32 of a part, all of whose blocks were added."""
        return join_crc32(self._crcs.get(part, {}))

    def digest(self, part: int) -> str:
        """The digest of a part, all of whose blocks were added."""
        return join_digests(self._digests.get(part, {}))


def chunk_digests(data: bytes) -> dict[int, int]:
    """Digests of the chunks of bytes that are in memory, by first byte."""
    return {start: chunk_digest(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)}


class RunningDigest:
    """The digest of bytes that come one after another."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._chunk = xxhash.xxh3_64()
        self._nbytes = 0

    def add(self, data: bytes) -> None:
        """Bytes that follow those before."""
        left = memoryview(data)
        while left:
            start = self._nbytes // CHUNK_BYTES * CHUNK_BYTES
            part = left[: start + CHUNK_BYTES - self._nbytes]
            self._chunk.update(part)
            self._nbytes += len(part)
            left = left[len(part) :]
            self._done[start] = self._chunk.intdigest()
            if self._nbytes == start + CHUNK_BYTES:
                self._chunk.reset()

    def value(self) -> str:
        """What ``digest_of`` says of all of them."""
        return join_digests(self._done)


def digest_of(read: Any, nbytes: int) -> str:
    """Digest of ``nbytes`` bytes.

    Args:
        read: from (offset, length) to the bytes there.
    """
    starts = range(0, nbytes, CHUNK_BYTES)
    return join_digests({start: chunk_digest(read(start, min(CHUNK_BYTES, nbytes - start))) for start in starts})
