"""Telling whether interrupted work is of the same plan and of unchanged sources.

Shapes alone do not tell: another padding, weighting or partition rule gives other bytes of the same shape.  So every
source, tensor and function says what it is (``anyckpt.identity``), down to where its pieces lie; nothing is read.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.engine.plan import Computed, Literal, Plan, SourceData, TensorData
from anyckpt.identity import identity_of
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import ByteSource


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a plan and the state of its sources.

    Attributes:
        value: equal for the same work, and never for other work.
        obstacle: what takes part in the plan and has no identity, so that no other run can be known to be the same;
            None if everything has one.
        sources: those that take part in the plan, as far as they were met.
        owned: whether bytes of the plan are those of one process (``OwnedSource``).
    """

    value: str
    obstacle: str | None = None
    sources: tuple[ByteSource, ...] = field(default=(), repr=False, compare=False)
    owned: bool = False

    def check_unchanged(self) -> None:
        """Raise FormatError if a source changed since it was opened: what was written is then of neither state."""
        for source in self.sources:
            source.check_unchanged()


class _UnidentifiedError(Exception):
    def __init__(self, value: Any) -> None:
        named = getattr(value, "name", None) or getattr(value, "__qualname__", None)
        self.what = f"{type(value).__name__} {named}" if isinstance(named, str) else type(value).__name__
        super().__init__(self.what)


def fingerprint(plan: Plan, source_paths: Sequence[str]) -> Fingerprint:
    """Identifies a plan and the state of its sources: sizes and modification times of every file.

    These are the files under the paths, and those that the plan reads, which may lie beside them: a rank's file is
    opened by the name of another rank's.
    """
    describer = _Describer()
    try:
        describer.add_plan(plan)
    except _UnidentifiedError as obstacle:
        return Fingerprint(uuid.uuid4().hex, obstacle.what, describer.sources())
    for root in source_paths:
        for path in _files_under(root):
            status = os.stat(path)
            describer.add(path, status.st_size, status.st_mtime_ns)
    return Fingerprint(describer.hexdigest(), None, describer.sources(), describer.owned)


_TEXTS = 1024
"""So many pieces of text go into the digest at once."""


class _Describer:
    """Puts values into a digest, each shared one once."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._texts: list[bytes] = []
        self._seen: dict[int, int] = {}
        self.owned = False
        self._kept: list[Any] = []  # so that no other value gets the identity of one that was seen

    def sources(self) -> tuple[ByteSource, ...]:
        return tuple(value for value in self._kept if isinstance(value, ByteSource))

    def add_plan(self, plan: Plan) -> None:
        self.add(plan.format, dict(plan.links))
        for file in plan.files:
            self.add("file", file.path, file.stage, file.nbytes)
            for part in file.parts:
                if isinstance(part, Literal):
                    self.add(part.data)
                elif isinstance(part, TensorData):
                    self.add(part.name, part.piece, part.tensor)
                elif isinstance(part, SourceData):
                    self.add(part.source)
                elif isinstance(part, Computed):
                    self.add("computed", part.nbytes, part.parts)

    def add(self, *values: Any) -> None:
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        kind = type(value)
        if kind is int or kind is str or value is None:
            self._text(repr(value))
        elif kind is tuple:
            self._text(f"sequence {len(value)}")
            for inner in value:
                self._add(inner)
        elif isinstance(value, DType):
            self._text(value.name)
        elif value is None or isinstance(value, bool | int | float | str | np.generic | np.dtype):
            self._text(repr(value))
        elif isinstance(value, bytes | memoryview):
            self._text(f"bytes {len(value)}")
            self._bytes(value)
        elif isinstance(value, np.ndarray):
            self._text(f"array {value.dtype} {value.shape}")
            self._bytes(value.tobytes())
        elif isinstance(value, tuple | list):
            self._text(f"sequence {len(value)}")
            self.add(*value)
        elif isinstance(value, dict):
            self._add([(str(key), item) for key, item in value.items()])
        elif id(value) in self._seen:
            self._text(f"seen {self._seen[id(value)]}")
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            self.owned = self.owned or isinstance(value, OwnedSource)
            said = identity_of(value)
            if said is None:
                raise _UnidentifiedError(value)
            self._text(f"{type(value).__module__}.{type(value).__qualname__}")
            self.add(*said)

    def _text(self, text: str) -> None:
        self._texts.append(b"\0" + text.encode("utf-8", "surrogatepass"))
        if len(self._texts) >= _TEXTS:
            self._bytes(b"")

    def _bytes(self, data: bytes | memoryview) -> None:
        self._digest.update(b"".join(self._texts))
        self._texts.clear()
        self._digest.update(data)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        self._bytes(b"")
        return self._digest.hexdigest()


def _files_under(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield os.path.abspath(root)
        return
    for folder, folders, names in os.walk(os.path.abspath(root)):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)
