"""Telling whether interrupted work is of the same plan and of unchanged sources.

Shapes alone do not tell: another padding, weighting or partition rule gives other bytes of the same shape.  So every
source, tensor and function says what it is (``anyckpt.identity``), down to where its pieces lie; nothing is read.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from anyckpt.data_classes import dataclass
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
    return _told(lambda describer: describer.add_plan(plan), source_paths)


def fingerprint_of(values: Iterable[Any], source_paths: Sequence[str]) -> Fingerprint:
    """Identifies what is looked at, with no plan: plain values, tensors and sources, and files under paths."""
    return _told(lambda describer: describer.add(*values), source_paths)


def _told(describe: Callable[[_Describer], None], source_paths: Sequence[str]) -> Fingerprint:
    describer = _Describer()
    try:
        describe(describer)
    except _UnidentifiedError as obstacle:
        return Fingerprint(uuid.uuid4().hex, obstacle.what, describer.sources())
    for root in source_paths:
        for path in _files_under(root):
            status = os.stat(path)
            describer.add(path, status.st_size, status.st_mtime_ns)
    return Fingerprint(describer.hexdigest(), None, describer.sources(), describer.owned)


_TEXTS = 4096
"""About so many pieces of text go into the digest at once."""


class _Kind(NamedTuple):
    """What is asked of every value of a type."""

    name: str
    is_source: bool
    is_owned: bool


@cache
def _spelling(dtype: np.dtype[Any]) -> str:
    return str(dtype)


class _Describer:
    """Puts values into a digest, each shared one once."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._texts: list[str] = []
        self._kinds: dict[type, _Kind] = {}
        self._seen: dict[int, int] = {}
        self._sources: list[ByteSource] = []
        self.owned = False
        self._kept: list[Any] = []  # so that no other value gets the identity of one that was seen

    def sources(self) -> tuple[ByteSource, ...]:
        return tuple(self._sources)

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
        self._add_all(values)

    def _add_all(self, values: Iterable[Any]) -> None:
        say = self._texts.append
        for value in values:
            kind = type(value)
            if kind is int or kind is str or value is None:  # most are
                say(repr(value))
            elif kind is tuple:
                say(f"sequence {len(value)}")
                self._add_all(value)
            elif kind is DType:
                say(value.name)
            else:
                self._add(value)
        if len(self._texts) >= _TEXTS:
            self._bytes(b"")

    def _add(self, value: Any) -> None:
        say = self._texts.append
        if isinstance(value, bool | int | float | str | np.generic | np.dtype):
            say(repr(value))
        elif isinstance(value, bytes | memoryview):
            say(f"bytes {len(value)}")
            self._bytes(value)
        elif isinstance(value, np.ndarray):
            say(f"array {_spelling(value.dtype)} {value.shape}")
            self._bytes(value.tobytes())
        elif isinstance(value, tuple | list):
            say(f"sequence {len(value)}")
            self._add_all(value)
        elif isinstance(value, dict):
            self._add([(str(key), item) for key, item in value.items()])
        elif id(value) in self._seen:
            say(f"seen {self._seen[id(value)]}")
        else:
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        kind = self._kind(type(value))
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if kind.is_source:
            self._sources.append(value)
            self.owned = self.owned or kind.is_owned
        said = identity_of(value)
        if said is None:
            raise _UnidentifiedError(value)
        self._texts.append(kind.name)
        self._add_all(said)

    def _kind(self, kind: type) -> _Kind:
        known = self._kinds.get(kind)
        if known is None:
            name = f"{kind.__module__}.{kind.__qualname__}"
            known = self._kinds[kind] = _Kind(name, issubclass(kind, ByteSource), issubclass(kind, OwnedSource))
        return known

    def _bytes(self, data: bytes | memoryview) -> None:
        if self._texts:
            self._digest.update("\0".join(["", *self._texts]).encode("utf-8", "surrogatepass"))
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
