"""What a ``.nemo`` is on disk: a plain tar, a gzip tar, or an unpacked directory; all of them folders of files.

NeMo 1.7 and later write plain tar, earlier versions gzip tar; no other compression was ever read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.folder import Folder, check_inside
from anyckpt.storage.inflate import GZIP, InflatedSource
from anyckpt.storage.location import Location
from anyckpt.storage.members import inflated_head, is_gzip
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar import TarFolder, TarMember, looks_like_tar, read_tar

CONFIG = "model_config.yaml"
FLAT_WEIGHTS = "model_weights.ckpt"
SHARDED_WEIGHTS = "model_weights"

_OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK\x03\x04": "zip"}
_PEEK = 4 << 20


@dataclass(frozen=True)
class Container:
    """An opened ``.nemo``.

    Attributes:
        folder: its files.
        kind: ``tar``, ``gzip tar`` or ``directory``.
        members: members of an archive by normalised name, in the archive's order; empty for a directory.
    """

    folder: Folder
    kind: str
    members: Mapping[str, TarMember] = field(default_factory=dict)


class Subfolder:
    """The files of ``folder`` below ``directory``, as a ``Folder``."""

    def __init__(self, folder: Folder, directory: str) -> None:
        self._folder = folder
        self._prefix = f"{directory}/"
        self.name = f"{folder.name} » {directory}"

    def names(self) -> list[str]:
        """Paths relative to the directory, sorted."""
        return sorted(name[len(self._prefix) :] for name in self._folder.names() if name.startswith(self._prefix))

    def open(self, name: str) -> ByteSource:
        """As the ``Folder`` protocol says."""
        return self._folder.open(self._prefix + check_inside(name, self.name))


def detect(location: Location) -> bool:
    """A file called ``*.nemo``, a tar that holds a ``model_config.yaml``, or a directory that does."""
    if location.is_directory:
        return CONFIG in location.names
    if location.suffix == ".nemo":
        return True
    try:
        if looks_like_tar(location.head):
            return CONFIG in read_tar(location.open())
        if is_gzip(location.head):
            return _has_config_in_gzip(location.open())
    except FormatError:
        return False
    return False


def _has_config_in_gzip(file: ByteSource) -> bool:
    """Whether the beginning of a gzip file is a tar with a configuration; without inflating all of it."""
    head = inflated_head(file, _PEEK, _PEEK)
    if not looks_like_tar(head):
        return False
    if f"{CONFIG}\0".encode() in head:
        return True
    return len(head) == _PEEK and CONFIG in read_tar(InflatedSource(file, None, GZIP))


def open_container(location: Location) -> Container:
    """The files of a ``.nemo``; of an archive only headers are read.

    Raises:
        FormatError: it is not a tar or gzip tar archive, or it is damaged.
        UnsafeError: it has members that a checkpoint has no business containing.
    """
    if location.is_directory:
        return Container(location.folder(), "directory")
    file = location.open()
    if is_gzip(location.head):
        return _archive(InflatedSource(file, None, GZIP), "gzip tar")
    for magic, name in _OTHER_COMPRESSION.items():
        if location.head.startswith(magic):
            raise FormatError(
                f"is a {name} file",
                path=location.path,
                expected="a plain or gzip tar archive, which is all that NeMo reads",
                remedy="decompress it and pack it as a plain tar, or check that it is the right file",
            )
    if not looks_like_tar(location.head.ljust(512, b"\0")):
        raise FormatError(
            "is not a tar archive",
            path=location.path,
            expected="a tar with model_config.yaml and weights (.nemo), or config.json and rank0.safetensors (.qnemo)",
            found=f"a file that begins with {location.head[:8]!r}",
            remedy="check that it is the right file and was copied whole (not a Git LFS pointer)",
        )
    return _archive(file, "tar")


def _archive(source: ByteSource, kind: str) -> Container:
    members = read_tar(source)
    return Container(TarFolder(members, "", source.name), kind, members)
