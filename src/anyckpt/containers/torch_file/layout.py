"""How records lie in a zip archive, as that of a torch file has them: headers, padding, descriptors and directory.

Every length is known when planning.  The CRC-32 of a tensor stands in the descriptor behind it and in the
directory, so both are computed when the tensor has been written.
Facts: the archives of torch 2.13 (its changed miniz), small and beyond 4 GiB.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from anyckpt.engine.checksum import crc32, join_crc32
from anyckpt.engine.plan import Computed, Literal, Part, SourceData, TensorData
from anyckpt.errors import UsageError

_WIDE = 0xFFFFFFFF
_LARGEST_ALIGNMENT = 32768  # the padding is an extra field, whose length has 16 bits
_CLOSING_ALIGNMENT = 64
_ID_DIGITS = 20


@dataclass(frozen=True)
class Record:
    """A record to be written.

    Attributes:
        name: full name.
        part: its contents.
        alignment: its contents begin at a multiple of this.
        head: bytes of the contents before ``part``, which has some itself.
    """

    name: str
    part: Literal | TensorData | SourceData
    alignment: int
    head: bytes = b""


@dataclass(frozen=True)
class _Placed:
    """A record with its place.

    Attributes:
        name: encoded name.
        size: bytes.
        header: offset of the local header from the start of the archive.
        crc: CRC-32, or None while unknown.
        head: its first bytes, which are known.
    """

    name: bytes
    size: int
    header: int
    crc: int | None
    head: bytes = b""

    def with_rest(self, crc: int) -> _Placed:
        """The same with the CRC-32 of all, from that of what follows the first bytes."""
        if self.head:
            known, rest = len(self.head), self.size - len(self.head)
            crc = join_crc32({0: (crc32(self.head), known), known: (crc, rest)})
        return replace(self, crc=crc)

    @property
    def _is_wide(self) -> bool:
        return self.size >= _WIDE or self.header >= _WIDE

    @property
    def _flags(self) -> int:
        return 0x0808 if self.size else 0x0800

    def _extra(self) -> bytes:
        values = [self.size] * 2 if self.size >= _WIDE else []
        values += [self.header] if self.header >= _WIDE else []
        return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""

    def local(self, base: int, alignment: int) -> bytes:
        """The local header, padded so that what follows is aligned, ``base`` bytes preceding the archive."""
        extra = self._extra()
        fixed = 30 + len(self.name) + len(extra) + 4
        filler = -(base + self.header + fixed) % alignment
        header = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 0, self._flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra) + 4 + filler
        )
        return header + self.name + extra + struct.pack("<2sH", b"FB", filler) + b"Z" * filler

    @property
    def descriptor_size(self) -> int:
        return 0 if not self.size else 24 if self._is_wide else 16

    def descriptor(self) -> bytes:
        if not self.size:
            return b""
        return struct.pack("<4sIQQ" if self._is_wide else "<4sIII", b"PK\x07\x08", self.crc, self.size, self.size)

    def central(self) -> bytes:
        """The entry in the directory."""
        extra = self._extra()
        size = min(self.size, _WIDE)
        fixed = struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02",
            0,
            0,
            self._flags,
            0,
            0,
            0,
            self.crc,
            size,
            size,
            len(self.name),
            len(extra),
            0,
            0,
            0,
            0,
            min(self.header, _WIDE),
        )
        return fixed + self.name + extra


def zip_layout(records: Sequence[Record], folder: str | None, base: int) -> tuple[Part, ...]:
    """The parts of an archive of ``records``, of torch's serialization id, and of the directory.

    Args:
        records: contents in order.
        folder: root folder of the serialization id; None for an archive without one.
        base: the archive's own offset in its file to align contents there, or 0 to align them within the archive.

    Raises:
        UsageError: an alignment that is not a power of two up to 32768.
    """
    parts: list[Part] = []
    placed: list[_Placed] = []
    data: list[int] = []  # which parts have a CRC-32 that is not known yet
    before: _Placed | None = None  # the last of these
    fixed = bytearray()  # what follows its descriptor
    position = 0
    for record in records:
        if not 0 < record.alignment <= _LARGEST_ALIGNMENT or record.alignment & (record.alignment - 1):
            raise UsageError("cannot align to that", expected="a power of two up to 32768", found=record.alignment)
        known = record.part.data if isinstance(record.part, Literal) else b"" if not record.part.nbytes else None
        crc = None if known is None else zlib.crc32(known)
        place = _Placed(record.name.encode(), len(record.head) + record.part.nbytes, position, crc, record.head)
        if record.head and crc is not None:
            place = place.with_rest(crc)
        placed.append(place)
        header = place.local(base, record.alignment) + record.head
        position += len(header) + record.part.nbytes + place.descriptor_size
        if known is not None:
            fixed += header + known + place.descriptor()
            continue
        fixed += header
        parts.append(_Gap(before, bytes(fixed)).part(tuple(data[-1:])))
        data.append(len(parts))
        parts.append(record.part)
        before, fixed = place, bytearray()
    gap = _Gap(before, bytes(fixed))
    identity = None if folder is None else f"{folder}/.data/serialization_id"
    end = partial(_end, tuple(placed), gap, identity, position, base)
    tail = end([0] * len(data))
    parts.append(Computed(len(tail), tuple(data), end) if data else Literal(tail))
    return tuple(parts)


def shift_parts(parts: Sequence[Part], by: int) -> tuple[Part, ...]:
    """The same parts for a file in which ``by`` other parts precede them: what is computed refers to parts by index."""
    return tuple(
        replace(part, parts=tuple(index + by for index in part.parts)) if isinstance(part, Computed) else part
        for part in parts
    )


@dataclass(frozen=True)
class _Gap:
    """What lies between two records of unknown CRC-32: the descriptor of the first, and bytes that are known."""

    before: _Placed | None
    fixed: bytes

    def part(self, data: tuple[int, ...]) -> Part:
        if self.before is None:
            return Literal(self.fixed)
        return Computed(self.before.descriptor_size + len(self.fixed), data, self.build)

    def build(self, crcs: Sequence[int]) -> bytes:
        if self.before is None:
            return self.fixed
        return self.before.with_rest(crcs[-1]).descriptor() + self.fixed


def _end(
    records: tuple[_Placed, ...], gap: _Gap, identity: str | None, position: int, base: int, crcs: Sequence[int]
) -> bytes:
    """What follows the last record of unknown CRC-32: the last gap, the serialization id, the directory."""
    left = iter(crcs)
    known = [record if record.crc is not None else record.with_rest(next(left)) for record in records]
    closing = b""
    if identity is not None:
        digits = _serialization_id(known)
        last = _Placed(identity.encode(), len(digits), position, zlib.crc32(digits))
        closing = last.local(base, _CLOSING_ALIGNMENT) + digits + last.descriptor()
        known.append(last)
    directory = b"".join(record.central() for record in known)
    start, count = position + len(closing), len(known)
    entries, size = min(count, 0xFFFF), len(directory)
    return b"".join(
        (
            gap.build(crcs),
            closing,
            directory,
            struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, size, start),
            struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1),
            struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, entries, entries, size, min(start, _WIDE), 0),
        )
    )


def _serialization_id(records: Sequence[_Placed]) -> bytes:
    """Forty digits that are equal for equal names and contents, as torch's are; nothing checks them."""
    names = hashlib.sha256(b"\0".join(record.name for record in records)).digest()
    contents = hashlib.sha256(b"".join(struct.pack("<I", record.crc) for record in records)).digest()
    halves = (int.from_bytes(digest[:8], "little") for digest in (names, contents))
    return "".join(str(half).zfill(_ID_DIGITS) for half in halves).encode()
