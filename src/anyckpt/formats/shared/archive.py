"""A ``.nemo`` or ``.qnemo`` being laid out: tar headers and contents as the parts of one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from anyckpt.containers.torch_file import shift_parts
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import Literal, OutputFile, Part, SourceData
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar_headers import tar_end, tar_header, tar_padding

LayOut = Callable[[int, bool], Sequence[Part]]
"""From the offset in the archive, and whether contents may be aligned to it, to the parts of a member."""


@dataclass(frozen=True)
class ArchiveKind:
    """What unpacking, packing and editing know of a format's archives.

    Attributes:
        format: its name.
        suffix: how such files are called.
        config: the member that describes the model.
        weights: which members hold weights, for messages.
        read: the configuration as plain data, from its bytes and what to call it in a message.
        dump: its text.
        is_weight: whether a member, by its name, holds weights.
        references: dotted key of the configuration -> member that it names.
        missing: the same of those that are not among some names.
        plain_name: what a person calls a member.
    """

    format: str
    suffix: str
    config: str
    weights: str
    read: Callable[[bytes, str], dict[str, Any]]
    dump: Callable[[dict[str, Any]], str]
    is_weight: Callable[[str], bool]
    references: Callable[[dict[str, Any]], Mapping[str, str]] = lambda config: {}
    missing: Callable[[dict[str, Any], Iterable[str]], Mapping[str, str]] = lambda config, names: {}
    plain_name: Callable[[str], str] = str


class ArchiveWriter:
    """Collects members; names are stored as given, which for NeMo means with ``./`` in front."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._position = 0

    def add_directory(self, name: str, mtime: int = 0) -> None:
        """A directory; NeMo's own archives begin with ``.``."""
        self._append([Literal(tar_header(name, 0, is_directory=True, mtime=mtime))])

    def add_bytes(self, name: str, data: bytes) -> None:
        """A member known when planning."""
        self.add(name, lambda offset, aligned: [Literal(data)])

    def add_source(self, name: str, source: ByteSource, mtime: int = 0) -> None:
        """A member copied verbatim."""
        self.add(name, lambda offset, aligned: [SourceData(source)] if source.size else [], mtime)

    def add_parts(self, name: str, parts: Sequence[Part]) -> None:
        """A member that is laid out already, wherever it begins."""
        self.add(name, lambda offset, aligned: parts)

    def add(self, name: str, lay_out: LayOut, mtime: int = 0) -> None:
        """A member whose parts depend on where in the archive it begins, because they align contents there.

        The header is longer from 8 GiB on, which moves what follows it; a member that is only that large while it
        is aligned to the shorter header's end is laid out without alignment, which has one size everywhere.
        """
        parts: Sequence[Part] = []
        size = 0
        for aligned in (True, True, False):
            header = tar_header(name, size, mtime=mtime)
            parts = lay_out(self._position + len(header), aligned)
            size = sum(part.nbytes for part in parts)
            if len(tar_header(name, size, mtime=mtime)) == len(header):
                break
        else:
            parts = lay_out(self._position + len(tar_header(name, size, mtime=mtime)), False)
        self._append([Literal(tar_header(name, size, mtime=mtime))])
        self._append(parts)
        if size % 512:
            self._append([Literal(tar_padding(size))])

    def file(self) -> OutputFile:
        """The archive as the one file of an output."""
        return OutputFile("", (*self._parts, Literal(tar_end(self._position))))

    def _append(self, parts: Sequence[Part]) -> None:
        self._parts += shift_parts(parts, len(self._parts))
        self._position += sum(part.nbytes for part in parts)
