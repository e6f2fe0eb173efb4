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

from anyckpt.data_classes import dataclass
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
        head: its first bytes, which are known.
    """

    name: bytes
    size: int
    header: int
    head: bytes = b""

    def crc_with(self, rest: int) -> int:
        """The CRC-32 of all, from that of what follows the first bytes."""
        if not self.head:
            return rest
        known = len(self.head)
        return join_crc32({0: (crc32(self.head), known), known: (rest, self.size - known)})

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

    def descriptor(self, crc: int) -> bytes:
        """What follows the contents, whose CRC-32 is given."""
        if not self.size:
            return b""
        return struct.pack("<4sIQQ" if self._is_wide else "<4sIII", b"PK\x07\x08", crc, self.size, self.size)

    def central(self, crc: int) -> bytes:
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
            crc,
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
    placed: list[tuple[_Placed, int | None]] = []  # with the CRC-32 where it is known
    data: list[int] = []  # which parts have a CRC-32 that is not known yet
    before: _Placed | None = None  # the last of these
    fixed = bytearray()  # what follows its descriptor
    position = 0
    for record in records:
        if not 0 < record.alignment <= _LARGEST_ALIGNMENT or record.alignment & (record.alignment - 1):
            raise UsageError("cannot align to that", expected="a power of two up to 32768", found=record.alignment)
        known = record.part.data if isinstance(record.part, Literal) else b"" if not record.part.nbytes else None
        place = _Placed(record.name.encode(), len(record.head) + record.part.nbytes, position, record.head)
        crc = None if known is None else place.crc_with(zlib.crc32(known))
        placed.append((place, crc))
        header = place.local(base, record.alignment) + record.head
        position += len(header) + record.part.nbytes + place.descriptor_size
        if known is not None and crc is not None:
            fixed += header + known + place.descriptor(crc)
            continue
        fixed += header
        parts.append(_Gap(before, bytes(fixed)).part(tuple(data[-1:])))
        data.append(len(parts))
        parts.append(record.part)
        before, fixed = place, bytearray()
    gap = _Gap(before, bytes(fixed))
    identity = None if folder is None else f"{folder}/.data/serialization_id"
    end = _End(placed, gap, identity, position, base)
    tail = end([0] * len(data))
    parts.append(Computed(len(tail), tuple(data), end) if data else Literal(tail))
    return tuple(parts)


def shift_parts(parts: Sequence[Part], by: int) -> tuple[Part, ...]:
    """The same parts for a file in which ``by`` other parts precede them: what is computed refers to parts by index."""
    return tuple(
        [
            Computed(part.nbytes, tuple([index + by for index in part.parts]), part.build)
            if isinstance(part, Computed)
            else part
            for part in parts
        ]
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
        return self.before.descriptor(self.before.crc_with(crcs[-1])) + self.fixed


class _End:
    """What follows the last record of unknown CRC-32: the last gap, the serialization id, the directory.

    Called with those CRC-32, in the order of their records.  Archives of alike tensors share one, and what their
    records of known CRC-32 have in the directory is made once.
    """

    def __init__(
        self, records: Sequence[tuple[_Placed, int | None]], gap: _Gap, identity: str | None, position: int, base: int
    ) -> None:
        self._gap = gap
        self._identity = identity
        self._position = position
        self._base = base
        self._records = [record if crc is None else _entered(record, crc) for record, crc in records]
        self._names = _digits(b"\0".join(record.name for record, _ in records))

    def __call__(self, crcs: Sequence[int]) -> bytes:
        left = iter(crcs)
        entered = [
            _entered(record, record.crc_with(next(left))) if isinstance(record, _Placed) else record
            for record in self._records
        ]
        entries = [entry for entry, _ in entered]
        closing = b""
        if self._identity is not None:
            digits = self._names + _digits(b"".join(crc for _, crc in entered))
            crc = zlib.crc32(digits)
            last = _Placed(self._identity.encode(), len(digits), self._position)
            closing = last.local(self._base, _CLOSING_ALIGNMENT) + digits + last.descriptor(crc)
            entries.append(last.central(crc))
        directory = b"".join(entries)
        start, count = self._position + len(closing), len(entries)
        few, size = min(count, 0xFFFF), len(directory)
        return b"".join(
            (
                self._gap.build(crcs),
                closing,
                directory,
                struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, size, start),
                struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1),
                struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, few, few, size, min(start, _WIDE), 0),
            )
        )


def _entered(record: _Placed, crc: int) -> tuple[bytes, bytes]:
    """A record's entry in the directory, and its CRC-32 as the serialization id is made of it."""
    return record.central(crc), struct.pack("<I", crc)


def _digits(said: bytes) -> bytes:
    """Half of a serialization id, which has forty digits, equal for equal names and contents as torch's are.

    Nothing checks them.
    """
    return str(int.from_bytes(hashlib.sha256(said).digest()[:8], "little")).zfill(_ID_DIGITS).encode()
