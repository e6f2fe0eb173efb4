"""Tar archives read in place: an index of members, each a range of the archive's bytes.

Only headers are read, by seeking from one to the next, so opening an archive costs one small read per member
whatever its size.  Whatever a checkpoint has no business containing (links, devices, names that climb out,
two members of one name) is an error, because tools disagree about what such a member means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.storage.folder import check_inside
from anyckpt.storage.heads import Ahead
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar_headers import (
    BLOCK,
    MAGIC,
    MAGIC_OFFSET,
    Header,
    checksum_matches,
    decoded,
    padded,
    parse_header,
    pax_number,
    pax_records,
)

_EXTENSION_LIMIT = 1 << 20
_MEMBER_LIMIT = 200_000
_DRIVE = re.compile(r"^[A-Za-z]:[\\/]")
_FILE_TYPES = (b"0", b"\0", b"7")
_FORBIDDEN_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"D": "a directory dump",
    b"M": "a continuation from another volume",
    b"S": "a sparse file",
    b"V": "a volume label",
}


@dataclass(frozen=True)
class TarMember:
    """One member.

    Attributes:
        name: path within the archive, without ``./`` in front and ``/`` behind; empty for the top directory.
        stored_name: as the archive spells it.
        source: its bytes, a range of the archive; empty for a directory.
        is_directory: whether it is one.
        mode: permission bits.
        mtime: seconds since 1970.
    """

    name: str
    stored_name: str
    source: ByteSource
    is_directory: bool
    mode: int = 0o644
    mtime: int = 0

    @property
    def size(self) -> int:
        return self.source.size


def looks_like_tar(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (at least 512 bytes of it) is an uncompressed tar archive."""
    if len(head) < BLOCK:
        return False
    return head[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] == MAGIC and checksum_matches(head[:BLOCK])


def read_tar(source: ByteSource) -> dict[str, TarMember]:
    """The members of an uncompressed tar archive by normalised name, in the archive's order.

    Reads ustar, V7, GNU (long names, base-256 numbers) and pax archives.

    Raises:
        FormatError: the archive is truncated or damaged, or uses an extension that no checkpoint writer does.
        UnsafeError: a member is absolute, climbs out of the archive, is a link, a device or a pipe, or is there
            twice.
    """
    members: dict[str, TarMember] = {}
    for member in _members(source):
        known = members.get(member.name)
        if known is not None:
            if known.is_directory and member.is_directory:
                continue
            raise UnsafeError(
                f"member {member.name!r} is in the archive twice",
                path=source.name,
                remedy="unpack it, decide which one is right, and pack it again",
            )
        if len(members) >= _MEMBER_LIMIT:
            raise UnsafeError("has too many members", path=source.name, expected=f"at most {_MEMBER_LIMIT}")
        members[member.name] = member
    _check_parents(members, source.name)
    return members


def _check_parents(members: dict[str, TarMember], archive: str) -> None:
    """A file that is also another member's directory is two different trees to two different tools."""
    for name in members:
        parent, slash, _ = name.rpartition("/")
        while slash:
            holder = members.get(parent)
            if holder is not None and not holder.is_directory:
                raise UnsafeError(f"member {parent!r} is a file and the directory of {name!r}", path=archive)
            parent, slash, _ = parent.rpartition("/")


def _members(source: ByteSource) -> Iterator[TarMember]:
    ahead = Ahead(source)
    offset = 0
    last = ""
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    long_name: str | None = None
    while True:
        block = _read_header_block(source, offset, last, ahead)
        if not any(block):
            _check_end(source, offset, last, ahead)
            if own or long_name:
                raise FormatError("ends with an extended header that belongs to no member", path=source.name)
            return
        header = parse_header(block, source.name, offset)
        offset += BLOCK
        if header.type in (b"x", b"g", b"L", b"K", b"X"):
            data = _read_extension(source, offset, header, ahead)
            offset += padded(header.size)
            if header.type == b"L":
                long_name = decoded(data.rstrip(b"\0"), source.name)
            elif header.type == b"g":
                shared.update(pax_records(data, source.name))
            elif header.type != b"K":
                own.update(pax_records(data, source.name))
            last = last or header.name
            continue
        records = {**shared, **own}
        name = records.get("path") or long_name or header.name
        size = pax_number(records, "size", header.size, source.name)
        own, long_name = {}, None
        if any(key.startswith("GNU.sparse.") for key in records):
            raise FormatError(f"member {name!r} is a sparse file, which cannot be read in place", path=source.name)
        clean = safe_name(name, source.name)
        is_directory = header.type == b"5" or (header.type in _FILE_TYPES and name.endswith("/"))
        if is_directory:
            size = 0
        else:
            _check_type(header.type, name, source.name)
        if not clean and not is_directory:
            raise UnsafeError("a member has no name", path=source.name)
        if offset + size > source.size:
            raise FormatError(
                f"is truncated in member {name!r}",
                path=source.name,
                expected=f"at least {offset + size} bytes",
                found=f"{source.size} bytes",
                remedy="copy the archive again from its origin",
            )
        content = source.slice(offset, size, f"{source.name} » {clean}")
        yield TarMember(clean, name, content, is_directory, header.mode & 0o7777, header.mtime)
        offset += padded(size)
        last = name


def _check_type(kind: bytes, name: str, archive: str) -> None:
    if kind in _FILE_TYPES:
        return
    if kind in _FORBIDDEN_TYPES:
        raise UnsafeError(
            f"member {name!r} is {_FORBIDDEN_TYPES[kind]}",
            path=archive,
            expected="only files and directories",
            remedy="do not use this archive unless you trust who made it; pack it again without that member",
        )
    raise FormatError(f"member {name!r} is of unknown type {kind!r}", path=archive)


def _read_header_block(source: ByteSource, offset: int, last: str, ahead: Ahead) -> bytes:
    if offset + BLOCK > source.size:
        after = f" after member {last!r}" if last else ""
        raise FormatError(
            f"is truncated{after}: its end mark is missing",
            path=source.name,
            expected=f"at least {offset + 2 * BLOCK} bytes",
            found=f"{source.size} bytes",
            remedy="copy the archive again from its origin",
        )
    return ahead.read(offset, BLOCK)


def _check_end(source: ByteSource, offset: int, last: str, ahead: Ahead) -> None:
    """Two zero blocks end an archive; one alone may be a hole in a damaged one."""
    if any(_read_header_block(source, offset + BLOCK, last, ahead)):
        raise FormatError(
            f"is damaged: a member is missing at byte {offset}",
            path=source.name,
            expected="a header",
            found="zeros",
        )


def _read_extension(source: ByteSource, offset: int, header: Header, ahead: Ahead) -> bytes:
    if header.size > _EXTENSION_LIMIT:
        raise UnsafeError(
            f"an extended header ({header.name!r}) is too large",
            path=source.name,
            expected=f"at most {_EXTENSION_LIMIT} bytes",
            found=header.size,
        )
    if offset + header.size > source.size:
        raise FormatError(
            f"is truncated in the extended header {header.name!r}",
            path=source.name,
            expected=f"at least {offset + header.size} bytes",
            found=f"{source.size} bytes",
            remedy="copy the archive again from its origin",
        )
    return ahead.read(offset, header.size)


def safe_name(name: str, archive: str) -> str:
    """``name`` without ``.`` components and doubled slashes.

    Raises:
        UnsafeError: it is absolute, has ``..`` in it, or a character that no file name has.
    """
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in re.split(r"[\\/]", name):
        raise UnsafeError(
            f"member {name!r} would be written outside the directory that it is unpacked to",
            path=archive,
            remedy="do not use this archive unless you trust who made it",
        )
    if any(ord(character) < 32 for character in name):
        raise UnsafeError(f"member {name!r} has control characters in its name", path=archive)
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class TarFolder:
    """A directory within an archive, as a ``Folder``: the files directly and indirectly below it.

    Args:
        members: what ``read_tar`` returned.
        directory: normalised name of the directory; empty for the whole archive.
        archive: what to call the archive in messages.
    """

    def __init__(self, members: dict[str, TarMember], directory: str, archive: str) -> None:
        prefix = f"{directory}/" if directory else ""
        self.name = f"{archive} » {directory}" if directory else archive
        self._files = {
            name[len(prefix) :]: member.source
            for name, member in members.items()
            if name.startswith(prefix) and not member.is_directory
        }

    def names(self) -> list[str]:
        """Paths of the files, relative to the directory, sorted."""
        return sorted(self._files)

    def open(self, name: str) -> ByteSource:
        """The contents of a file.

        Raises:
            UnsafeError: the name leads out of the directory.
            FormatError: there is none of that name.
        """
        source = self._files.get(check_inside(name, self.name))
        if source is None:
            raise FormatError(f"has no member {name!r}", path=self.name)
        return source
