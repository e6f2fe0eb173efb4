"""Telling whether interrupted work is of the same plan and of unchanged sources.

Shapes alone do not tell: another padding, weighting or partition rule gives other bytes of the same shape.  So the
whole description of each tensor counts, down to where its pieces lie; nothing is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.engine.plan import Computed, Literal, Plan, SourceData, TensorData
from anyckpt.storage.source import ByteSource, LocalFile, MemorySource
from anyckpt.tensor import LazyTensor

_OF_A_SOURCE = ("name", "path", "size", "_base", "_offset", "_row", "_header")
"""Attributes that say which bytes a source is; others are what it has found out while reading."""


def fingerprint(plan: Plan, source_paths: Sequence[str]) -> str:
    """Identifies a plan and the state of its sources: sizes and modification times of every file.

    These are the files under the paths, and those that the plan reads, which may lie beside them: a rank's file is
    opened by the name of another rank's.
    """
    describer = _Describer()
    describer.add(plan.format, dict(plan.links))
    for file in plan.files:
        describer.add("file", file.path, file.stage, file.nbytes)
        for part in file.parts:
            if isinstance(part, Literal):
                describer.add(part.data)
            elif isinstance(part, TensorData):
                describer.add(part.name, part.piece, part.tensor)
            elif isinstance(part, SourceData):
                describer.add(part.source)
            elif isinstance(part, Computed):
                describer.add("computed", part.nbytes, part.parts)
    for root in source_paths:
        for path in _files_under(root):
            describer.add(path, *_state(path))
    return describer.digest.hexdigest()


def _state(path: str) -> tuple[int, int]:
    """Size and time of last modification."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class _Describer:
    """Puts values into a digest, each shared one once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no other value gets the identity of one that was seen

    def add(self, *values: Any) -> None:
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, DType):
            self._text(value.name)
        elif value is None or isinstance(value, bool | int | float | str | np.generic | np.dtype):
            self._text(repr(value))
        elif isinstance(value, bytes | memoryview):
            self._text(f"bytes {len(value)}")
            self.digest.update(value)
        elif isinstance(value, np.ndarray):
            self._text(f"array {value.dtype} {value.shape}")
            self.digest.update(value.tobytes())
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
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        self._text(f"{type(value).__module__}.{type(value).__qualname__}")
        if isinstance(value, MemorySource):
            self.add(*(getattr(value, name) for name in MemorySource.__slots__))
        elif isinstance(value, ByteSource):
            self.add(*(getattr(value, name, None) for name in _OF_A_SOURCE))
            if isinstance(value, LocalFile) and value.path is not None:
                self.add(*_state(value.path))
        elif isinstance(value, LazyTensor):
            self.add(*(getattr(value, name, None) for name in _slots(type(value))))
        elif isinstance(value, Sequence):
            # Pieces that are made when asked for: asking may read their headers, and their numbers tell enough.
            self.add(len(value), *(item for item in vars(value).values() if isinstance(item, np.ndarray | str)))
        elif callable(value):
            self._add_function(value)

    def _add_function(self, function: Callable[..., Any]) -> None:
        self._text(f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}")
        self.add(*(cell.cell_contents for cell in getattr(function, "__closure__", None) or ()))
        self.add(*(getattr(function, "args", ())), getattr(function, "keywords", {}))

    def _text(self, text: str) -> None:
        self.digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        yield from getattr(base, "__slots__", ())


def _files_under(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield os.path.abspath(root)
        return
    for folder, folders, names in os.walk(os.path.abspath(root)):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)
