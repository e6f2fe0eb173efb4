"""The members of archives, to which paths lead: ``models.zip::policy.pth`` is a member of the zip ``models.zip``."""

from __future__ import annotations

import zlib

from anyckpt.errors import FormatError
from anyckpt.storage.inflate import GZIP, InflatedSource
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar import looks_like_tar, read_tar
from anyckpt.storage.zip import read_zip

SEPARATOR = "::"

_ZIP_MAGIC = b"PK\x03\x04"
_GZIP_MAGIC = b"\x1f\x8b"
_PEEK = 512
_INPUT = 64 << 10


def is_archive(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a zip or tar archive."""
    return head.startswith(_ZIP_MAGIC) or looks_like_tar(head)


def is_gzip(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a gzip stream, which may be of a tar archive."""
    return head.startswith(_GZIP_MAGIC)


class NotArchiveError(FormatError):
    """What should be an archive is none."""


def members(source: ByteSource) -> dict[str, ByteSource]:
    """The files of a zip or tar archive by name.

    Raises:
        NotArchiveError: it is neither.
        FormatError: it is a damaged one.
        UnsafeError: it has members that no archive of checkpoints needs.
    """
    head = source.read(0, min(_PEEK, source.size))
    if head.startswith(_ZIP_MAGIC):
        return {name: record.source for name, record in read_zip(source).items()}
    if is_gzip(head) and looks_like_tar(inflated_head(source)):
        return members(InflatedSource(source, None, GZIP))
    if looks_like_tar(head):
        return {name: member.source for name, member in read_tar(source).items() if not member.is_directory}
    raise NotArchiveError("is not an archive, so that nothing lies in it", path=source.name, expected="zip or tar")


def inflated_head(source: ByteSource, read: int = _INPUT, most: int = _PEEK) -> bytes:
    """How the contents of a gzip file begin, at most ``most`` bytes of what ``read`` hold; nothing if it is none."""
    try:
        return zlib.decompressobj(GZIP).decompress(source.read(0, min(source.size, read)), most)
    except zlib.error:
        return b""
