"""The zip container of a torch file, read by its central directory over any source of bytes.

Python's ``zipfile`` seeks through a file object and reads each local header; here a file of any size opens
with a read at its end and one of its directory, and a record's local header is read when the record is.
Facts: PKWARE APPNOTE 6.3, and what torch 1.6 to 2.13 writes and accepts.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.identity import Identity
from anyckpt.storage.inflate import RAW, InflatedSource
from anyckpt.storage.source import ByteSource

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_LARGEST_DIRECTORY = 256 << 20
_TAIL = 1 << 10
_LONGEST_TAIL = _END.size + 0xFFFF
_STORED, _DEFLATED = 0, 8
_USUAL_EXTRA = 4200  # bytes of padding in a local header: up to a page, where a writer aligns to pages


@dataclass(frozen=True)
class ZipRecord:
    """A member of the archive.

    Attributes:
        name: full name, with the archive's root folder.
        source: its contents, decompressed.
        crc: CRC-32 as stored; 0 on contents that are not empty means that the writer did not compute it
            (``torch.serialization.set_crc32_options(False)``).
        compressed: whether it is deflated.
    """

    name: str
    source: ByteSource
    crc: int
    compressed: bool

    def check(self) -> bool:
        """Read the contents and compare their CRC-32; False if there is none to compare with.

        Raises:
            FormatError: it differs, or the contents cannot be read.
        """
        found, position = 0, 0
        buffer = memoryview(bytearray(min(1 << 20, self.source.size)))
        while position < self.source.size:
            part = buffer[: self.source.size - position]
            self.source.read_into(position, part)
            found = zlib.crc32(part, found)
            position += len(part)
        if self.crc == 0 and self.source.size:
            return False
        if found != self.crc:
            raise _damaged(
                "the contents are damaged: their checksum differs",
                path=self.source.name,
                expected=f"CRC-32 {self.crc:08x}",
                found=f"{found:08x}",
            )
        return True


class RecordSource(ByteSource):
    """The bytes of one record; its local header, which alone says where they begin, is read with the first of them.

    Args:
        base: the archive.
        name: what to call the record in a message.
        entry: the record's name as it is in the directory.
        header: offset of its local header.
        size: bytes stored.
        limit: offset at which the next record or the directory begins.
    """

    __slots__ = ("_base", "_entry", "_header", "_limit", "_start")

    def __init__(self, base: ByteSource, name: str, entry: bytes, header: int, size: int, limit: int) -> None:
        self._base = base
        self._entry = entry
        self._header = header
        self._limit = limit
        self._start = -1
        self.name = name
        self.path = base.path
        self.size = size

    def identity(self) -> Identity:
        return self._base, self._entry, self._header, self.size

    def _begin(self) -> int:
        if self._start < 0:
            fixed = self._base.read(self._header, _LOCAL.size + len(self._entry))
            signature, _, _, _, _, _, _, _, _, name_length, extra = _LOCAL.unpack_from(fixed)
            start = self._header + _LOCAL.size + name_length + extra
            if signature != b"PK\x03\x04" or fixed[_LOCAL.size :] != self._entry or name_length != len(self._entry):
                raise _damaged(
                    "the record is not where the archive's directory says",
                    path=self.name,
                    expected=f"its header at byte {self._header}",
                )
            if start + self.size > self._limit:
                raise _damaged(
                    "the record overlaps what follows it",
                    path=self.name,
                    expected=f"an end before byte {self._limit}",
                    found=start + self.size,
                )
            self._start = start
        return self._start

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self._base.read_through(self._begin() + offset, buffer)

    @property
    def at_once(self) -> int:
        return self._base.at_once

    def wanted(self, offset: int, length: int) -> Iterator[tuple[ByteSource, int, int]]:
        """Where the record begins is not known before its header is read: then one range that has both."""
        if self._start >= 0:
            return self._base.wanted(self._start + offset, length)
        most = _LOCAL.size + len(self._entry) + _USUAL_EXTRA
        if offset <= _USUAL_EXTRA:
            return self._base.wanted(self._header, min(most + offset + length, self._limit - self._header))
        return chain(
            self._base.wanted(self._header, most),
            self._base.wanted(self._header + offset, min(most + length, self._limit - self._header - offset)),
        )

    def place(self) -> tuple[Hashable, int]:
        return (*self._base.place(), self._header), 0

    def locate(self) -> tuple[str | None, int]:
        path, start = self._base.locate()
        return path, start + self._begin()


@dataclass(frozen=True)
class _Entry:
    name: bytes
    text: str
    method: int
    flags: int
    crc: int
    stored: int
    size: int
    header: int


def directory_of(source: ByteSource) -> tuple[int, int]:
    """Where the directory of an archive begins, and its bytes.

    Raises:
        FormatError: see ``read_zip``.
    """
    start, size, _ = _directory(source)
    return start, size


def read_zip(source: ByteSource) -> dict[str, ZipRecord]:
    """The records of an archive by name, in the directory's order; folders are left out.

    Raises:
        FormatError: not a zip archive, truncated, or one whose directory contradicts itself: duplicate names,
            records that overlap or lie outside, encryption, a compression other than deflate.
        UnsafeError: a name that is absolute or climbs out of the archive, or a size that cannot be.
    """
    start, size, count = _directory(source)
    entries = _entries(source, source.read(start, size), count)
    limits: dict[int, int] = {}
    following = start
    for entry in sorted(entries, key=lambda e: e.header, reverse=True):
        if entry.header + _LOCAL.size + len(entry.name) + entry.stored > following:
            raise _damaged(
                "two records overlap, or one lies outside the file",
                path=f"{source.name} » {entry.text}",
                expected=f"an end before byte {following}",
                found=entry.header + _LOCAL.size + len(entry.name) + entry.stored,
            )
        limits[entry.header] = following
        following = entry.header
    records: dict[str, ZipRecord] = {}
    for entry in entries:
        name = f"{source.name} » {entry.text}"
        content: ByteSource = RecordSource(source, name, entry.name, entry.header, entry.stored, limits[entry.header])
        if entry.method == _DEFLATED:
            content = InflatedSource(content, entry.size, RAW, name)
        if not entry.text.endswith("/"):
            records[entry.text] = ZipRecord(entry.text, content, entry.crc, entry.method == _DEFLATED)
    return records


def _directory(source: ByteSource) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the central directory."""
    end, at = _end_record(source)
    _, disk, start_disk, _, count, size, start, _ = _END.unpack(end)
    if at >= _LOCATOR.size:
        locator = _LOCATOR.unpack(source.read(at - _LOCATOR.size, _LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            end64 = _END64.unpack(source.read(locator[2], _END64.size))
            if end64[0] != b"PK\x06\x06" or locator[2] + _END64.size > at:
                raise _damaged("the zip64 end record is damaged", path=source.name)
            at = locator[2]
            disk, start_disk, count, size, start = end64[4], end64[5], end64[7], end64[8], end64[9]
    if disk or start_disk:
        raise FormatError("is one volume of a zip archive in several", path=source.name)
    if start + size > at or count * _CENTRAL.size > size or size > _LARGEST_DIRECTORY:
        raise _damaged(
            "the archive's directory lies outside the file, or bytes precede the archive",
            path=source.name,
            expected=f"{count} entries before byte {at}",
            found=f"[{start}, {start + size})",
        )
    return start, size, count


def _end_record(source: ByteSource) -> tuple[bytes, int]:
    """The end-of-directory record and its offset; bytes after it are allowed, as torch does."""
    for span in (_TAIL, _LONGEST_TAIL):
        begin = max(0, source.size - span)
        tail = source.read(begin, source.size - begin)
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0:
            if at + _END.size <= len(tail):
                comment = int.from_bytes(tail[at + 20 : at + 22], "little")
                if at + _END.size + comment <= len(tail):
                    return tail[at : at + _END.size], begin + at
            at = tail.rfind(b"PK\x05\x06", 0, at)
    raise _damaged("begins as a zip archive but has no end record; it is truncated", path=source.name)


def _entries(source: ByteSource, directory: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    seen: set[str] = set()
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\x01\x02":
            raise _damaged("the archive's directory is damaged", path=source.name)
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method, crc, stored, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, header = fields[10], fields[11], fields[12], fields[16]
        at += _CENTRAL.size
        name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if at > len(directory):
            raise _damaged("the archive's directory is damaged", path=source.name)
        text = name.decode("utf-8", "surrogateescape") if flags & 0x800 else name.decode("cp437")
        size, stored, header = _wide(source, text, extra, size, stored, header)
        entry = _Entry(name, text, method, flags, crc, stored, size, header)
        _check(source, entry)
        if text in seen:
            raise FormatError(
                "the archive has two records of one name",
                path=f"{source.name} » {text}",
                remedy="do not trust this file: which of the two is read depends on the program",
            )
        seen.add(text)
        entries.append(entry)
    return entries


def _wide(source: ByteSource, name: str, extra: bytes, *narrow: int) -> tuple[int, int, int]:
    """Sizes and offset with those that do not fit in 32 bits taken from the zip64 extra field."""
    values = list(narrow)
    missing = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    at = 0
    while missing and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and length >= 8 * len(missing) and at + 4 + length <= len(extra):
            for position, index in enumerate(missing):
                values[index] = struct.unpack_from("<Q", extra, at + 4 + 8 * position)[0]
            break
        at += 4 + length
    else:
        if missing:
            raise _damaged(
                "a record's size or offset is missing from the archive's directory",
                path=f"{source.name} » {name}",
            )
    return values[0], values[1], values[2]


def _check(source: ByteSource, entry: _Entry) -> None:
    """Raise unless the entry is one that can be read."""
    path = f"{source.name} » {entry.text}"
    parts = entry.text.replace("\\", "/").split("/")
    if entry.text.startswith(("/", "\\")) or ".." in parts or "\0" in entry.text:
        raise UnsafeError("a record's name climbs out of the archive", path=path, remedy="do not unpack this file")
    if entry.flags & 0x2041:
        raise FormatError("the record is encrypted", path=path, remedy="decrypt the file first")
    if entry.method not in (_STORED, _DEFLATED):
        raise FormatError(
            "the record is compressed in a way that checkpoints are not",
            path=path,
            expected="method 0 (stored) or 8 (deflated)",
            found=f"method {entry.method}",
            remedy="unpack the archive and pack it again without compression",
        )
    if entry.method == _STORED and entry.stored != entry.size:
        raise _damaged(
            "the record's two sizes differ although it is not compressed",
            path=path,
            expected=f"{entry.size} bytes",
            found=f"{entry.stored} bytes",
        )


def _damaged(problem: str, **facts: Any) -> FormatError:
    return FormatError(problem, remedy="copy the file again from its origin", **facts)
