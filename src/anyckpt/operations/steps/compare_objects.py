"""Whether the state that is no tensor is the same in two checkpoints, found by a walk that nothing nested can break."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from anyckpt.checkpoint import CompositeTensor
from anyckpt.operations.steps.configurations import Setting
from anyckpt.pickling.plain import record_parts, to_plain
from anyckpt.pickling.records import DictRecord, Global, PersistentId, Record
from anyckpt.tensor import LazyTensor, from_array

_MOST = 1000
_LONGEST = 80
_CHUNK_BYTES = 1 << 20
_FRACTIONS = ("float16", "float32", "float64", "complex64", "complex128")
_NONE = object()


def compare_objects(
    a: Mapping[str, Any], b: Mapping[str, Any], *, tensors: bool, sequences_alike: bool = False
) -> Iterator[Setting]:
    """Where the objects of two checkpoints differ, at most a thousand places.

    Nothing is executed: objects of classes are the same if they are built in the same way.

    Args:
        a: name -> object.
        b: likewise.
        tensors: compare tensors inside them, too; otherwise they are compared by type and shape alone.
        sequences_alike: a list is the same as a tuple of the same elements, as between formats.
    """
    return islice(_walk(a, b, tensors, sequences_alike), _MOST)


def _walk(a: Mapping[str, Any], b: Mapping[str, Any], tensors: bool, sequences_alike: bool) -> Iterator[Setting]:
    seen: set[tuple[int, int]] = set()
    todo: list[tuple[str, Any, Any]] = [
        (name, a.get(name, _NONE), b.get(name, _NONE)) for name in reversed(dict.fromkeys((*a, *b)))
    ]
    while todo:
        name, one, other = todo.pop()
        if one is _NONE or other is _NONE or _kind(one, sequences_alike) != _kind(other, sequences_alike):
            yield Setting(name, _text(one), _text(other))
            continue
        parts = _parts(one)
        if parts is None:
            if not _same_leaf(one, other, tensors):
                yield Setting(name, _text(one), _text(other))
            continue
        if (id(one), id(other)) in seen:
            continue
        seen.add((id(one), id(other)))
        if not sequences_alike and isinstance(one, Mapping):
            kinds = [sorted((_key(key), type(key).__name__) for key in side) for side in (one, other)]
            yield from _of_keys(name, kinds[0], kinds[1])
        todo += reversed([(f"{name}.{key}", x, y) for key, x, y in _aligned(parts, _parts(other) or [])])


def _of_keys(name: str, a: list[tuple[str, str]], b: list[tuple[str, str]]) -> Iterator[Setting]:
    """Keys of one text that are a number in the one and a string in the other, which no lookup takes for the same."""
    if a != b:
        first, second = dict(a), dict(b)
        for text in first.keys() & second.keys():
            if first[text] != second[text]:
                yield Setting(f"{name}.{text}", f"under a key of type {first[text]}", f"of type {second[text]}")


def _aligned(a: list[tuple[str, Any]], b: list[tuple[str, Any]]) -> list[tuple[str, Any, Any]]:
    if [key for key, _ in a] == [key for key, _ in b]:
        return [(key, x, y) for (key, x), (_, y) in zip(a, b, strict=True)]
    first, second = dict(a), dict(b)
    return [(key, first.get(key, _NONE), second.get(key, _NONE)) for key in dict.fromkeys((*first, *second))]


def _kind(obj: Any, sequences_alike: bool) -> str:
    if sequences_alike and isinstance(obj, tuple):
        return "list"
    if isinstance(obj, (Record, DictRecord)):
        return obj.path if isinstance(obj, Record) else obj.type.path
    return type(obj).__name__


def _parts(obj: Any) -> list[tuple[str, Any]] | None:
    """What an object holds, by the text of its key; None if it holds nothing else."""
    if isinstance(obj, DictRecord):
        extra = [("args", obj.args), ("__dict__", obj.state)]
        return [*((_key(key), value) for key, value in obj.items()), *extra]
    if isinstance(obj, Mapping):
        return [(_key(key), value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [(str(number), value) for number, value in enumerate(obj)]
    if isinstance(obj, (set, frozenset)):
        return [(str(number), value) for number, value in enumerate(sorted(obj, key=_key))]
    if isinstance(obj, Record):
        callee = [] if isinstance(obj.type, Global) else [("type", obj.type)]
        return [*callee, *((_key(key), value) for key, value in record_parts(obj))]
    if isinstance(obj, PersistentId):
        return [("id", obj.id)]
    if isinstance(obj, CompositeTensor) and is_dataclass(obj):
        return [(part.name, getattr(obj, part.name)) for part in fields(obj)]
    return None


def leaves_within(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is inside objects and holds nothing else, by name and keys with dots.

    A tensor or an array that is in several places comes once; numpy's arrays of fractions come as tensors.
    """
    seen: dict[int, Any] = {}  # the objects too, so that no other gets the number of one that is gone
    todo: list[tuple[str, Any]] = [(name, objects[name]) for name in reversed(list(objects))]
    while todo:
        name, obj = todo.pop()
        if id(obj) in seen:
            continue
        parts = _parts(obj)
        if parts is not None:
            seen[id(obj)] = obj
            todo += reversed([(f"{name}.{key}", value) for key, value in parts])
        elif isinstance(obj, np.ndarray):
            seen[id(obj)] = obj
            fractions = obj.dtype.name in _FRACTIONS
            yield name, from_array(obj.astype(obj.dtype.newbyteorder("<"), copy=False)) if fractions else obj
        else:
            if isinstance(obj, LazyTensor):
                seen[id(obj)] = obj
            yield name, obj


def _key(key: Any) -> str:
    if isinstance(key, Record):
        return key.path
    return key if isinstance(key, str) else repr(key)


def _same_leaf(a: Any, b: Any, tensors: bool) -> bool:
    if isinstance(a, LazyTensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return not tensors or all(
            x is not None and y is not None and x.tobytes() == y.tobytes()
            for x, y in zip_longest(a.chunks(_CHUNK_BYTES), b.chunks(_CHUNK_BYTES))
        )
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    return a is b or bool(a == b)


def _text(obj: Any) -> str | None:
    """An object in a line; None for none."""
    if obj is _NONE:
        return None
    if isinstance(obj, LazyTensor):
        return f"{obj.dtype.name} {list(obj.shape)}"
    plain = to_plain(obj, max_nodes=20, max_depth=3)
    shown = plain if isinstance(plain, str) else repr(plain)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
