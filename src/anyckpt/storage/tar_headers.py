"""The headers and marks of tar archives, read and written.

Sources: POSIX.1-2001 pax (ustar headers, extended headers ``x`` and ``g``), the GNU tar manual (``L``, ``K``,
base-256 numbers), and Python's ``tarfile``, whose default (pax) headers are reproduced.
"""

from __future__ import annotations

import re

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError

BLOCK = 512
RECORD = 10240
"""``tarfile`` and GNU tar pad an archive with zeros to a multiple of this."""
MAGIC_OFFSET = 257
MAGIC = b"ustar"


@dataclass(frozen=True)
class Header:
    name: str
    type: bytes
    size: int
    mode: int
    mtime: int


def parse_header(block: bytes, archive: str, offset: int) -> Header:
    if not checksum_matches(block):
        raise FormatError(
            f"is damaged: the header at byte {offset} has a wrong checksum",
            path=archive,
            remedy="copy the archive again from its origin",
        )
    name = decoded(_cut(block[0:100]), archive)
    if block[MAGIC_OFFSET : MAGIC_OFFSET + 6] == b"ustar\0":
        prefix = decoded(_cut(block[345:500]), archive)
        name = f"{prefix}/{name}" if prefix else name
    size = _number(block[124:136], archive, offset)
    if size < 0:
        raise FormatError(f"member {name!r} has a negative size", path=archive, found=size)
    mode = _number(block[100:108], archive, offset)
    mtime = _number(block[136:148], archive, offset)
    return Header(name, block[156:157], size, mode, mtime)


def checksum_matches(block: bytes) -> bool:
    try:
        stored = _octal(block[148:156])
    except ValueError:
        return False
    blank = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blank)
    return stored in (unsigned, unsigned - 256 * sum(byte > 127 for byte in blank))


def _number(field: bytes, archive: str, offset: int) -> int:
    """A numeric field: octal digits, or base-256 where the first bit is set (two's complement below it)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (1 << (8 * (len(field) - 1)) if field[0] == 0xFF else 0)
    try:
        return _octal(field)
    except ValueError as error:
        raise FormatError(
            f"is damaged: the header at byte {offset} has a number that is none", path=archive, found=field
        ) from error


def _octal(field: bytes) -> int:
    digits = _cut(field).strip()
    if not digits:
        return 0
    if not re.fullmatch(rb"[0-7]+", digits):
        raise ValueError(digits)
    return int(digits, 8)


def pax_records(data: bytes, archive: str) -> dict[str, str]:
    """The records ``"<length> <key>=<value>\\n"`` of an extended header."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 20)
        digits = data[position:space] if space > 0 else b""
        end = position + int(digits) if re.fullmatch(rb"[0-9]+", digits) else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise FormatError("is damaged: an extended header cannot be read", path=archive)
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            records[decoded(key, archive)] = decoded(value, archive)
        position = end
    return records


def pax_number(records: dict[str, str], key: str, default: int, archive: str) -> int:
    text = records.get(key)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise FormatError(f"is damaged: an extended header has a {key} that is no number", path=archive, found=text)
    return int(text)


def _cut(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def decoded(field: bytes, archive: str) -> str:
    try:
        return field.decode()
    except UnicodeDecodeError as error:
        raise FormatError("a member's name is not UTF-8", path=archive, found=field) from error


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def tar_header(name: str, size: int, *, is_directory: bool = False, mtime: int = 0) -> bytes:
    """The header blocks of a member, byte for byte those of Python's ``tarfile`` in its default (pax) format.

    Names over 100 bytes or outside ASCII and sizes from 8 GiB on take an extended header of their own.

    Args:
        name: as stored, such as ``./model_config.yaml``.
        size: bytes of the payload; 0 for a directory.
        is_directory: whether the member is one.
        mtime: seconds since 1970; constant by default, so that the same input gives the same archive.
    """
    import tarfile

    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = mtime
    info.mode = 0o755 if is_directory else 0o644
    info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT)


def tar_padding(size: int) -> bytes:
    """The zeros after a payload of ``size`` bytes."""
    return bytes(-size % BLOCK)


def tar_end(position: int) -> bytes:
    """The end mark of an archive whose members take ``position`` bytes, padded as ``tarfile`` does."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % RECORD)
