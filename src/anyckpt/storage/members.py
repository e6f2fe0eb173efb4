"""Paths that lead into archives: ``models.zip::policy.pth`` is the member ``policy.pth`` of the zip or tar archive."""

from __future__ import annotations

import os
import zlib

from anyckpt.errors import FormatError
from anyckpt.storage.inflate import GZIP, InflatedSource
from anyckpt.storage.source import ByteSource, LocalFile
from anyckpt.storage.tar import looks_like_tar, read_tar
from anyckpt.storage.zip import read_zip

SEPARATOR = "::"

_MOST_SHOWN = 8
_ZIP_MAGIC = b"PK\x03\x04"
_GZIP_MAGIC = b"\x1f\x8b"
_PEEK = 512
_INPUT = 64 << 10


def split_path(path: str) -> tuple[str, tuple[str, ...]]:
    """The file on disk, and the members that lead from it to what is meant; none for an ordinary path."""
    if SEPARATOR not in path or os.path.lexists(path):
        return path, ()
    parts = path.split(SEPARATOR)
    for count in range(len(parts) - 1, 0, -1):
        file = SEPARATOR.join(parts[:count])
        if os.path.isfile(file):
            return file, tuple(parts[count:])
    return path, ()


def file_of(path: str) -> str:
    """The file or directory on disk that a path leads to or into."""
    return split_path(path)[0]


def is_archive(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a zip or tar archive."""
    return head.startswith(_ZIP_MAGIC) or looks_like_tar(head)


def members(source: ByteSource) -> dict[str, ByteSource] | None:
    """The files of an archive by name; None if a source is no zip or tar archive.

    Raises:
        FormatError: it is a damaged one.
        UnsafeError: it has members that no archive of checkpoints needs.
    """
    head = source.read(0, min(_PEEK, source.size))
    if head.startswith(_ZIP_MAGIC):
        return {name: record.source for name, record in read_zip(source).items()}
    if head.startswith(_GZIP_MAGIC):
        return members(InflatedSource(source, None, GZIP)) if looks_like_tar(_inflated_head(source)) else None
    if looks_like_tar(head):
        return {name: member.source for name, member in read_tar(source).items() if not member.is_directory}
    return None


def _inflated_head(source: ByteSource) -> bytes:
    try:
        return zlib.decompressobj(GZIP).decompress(source.read(0, min(source.size, _INPUT)), _PEEK)
    except zlib.error:
        return b""


def open_path(path: str) -> ByteSource:
    """The bytes at a path, which may lead into an archive, and into one that lies in it.

    Raises:
        FormatError: there is no such file or member, or what should be an archive is none.
        UnsafeError: see ``members``.
    """
    file, inner = split_path(path)
    source: ByteSource = LocalFile(file)
    for name in inner:
        found = members(source)
        if found is None:
            raise FormatError("is not an archive, so that nothing lies in it", path=source.name, expected="zip or tar")
        if name not in found:
            names = list(found)
            raise FormatError(
                f"has no member {name!r}",
                path=source.name,
                found=", ".join(names[:_MOST_SHOWN]) + (" ..." if names[_MOST_SHOWN:] else ""),
                remedy="name one of its members",
            )
        source = found[name]
    return source
