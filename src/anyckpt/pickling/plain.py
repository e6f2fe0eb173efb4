"""Plain views of what a pickle holds: records of well-known types as dictionaries, lists and scalars.

The reader keeps such records faithful so that they can be written back; what is shown to people, compared or
used as configuration goes through these functions.  All of them are iterative and visit shared parts within a
bound, so neither depth nor sharing of a hostile file can exhaust them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from anyckpt.pickling.numpy_values import rebuild
from anyckpt.pickling.records import Global, Record

_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_SCALARS = (str, bytes, bytearray, int, float, complex, type(None), Global, range, slice)
_CHARACTERS_PER_NODE = 100
_LONGEST_STRING = 10_000
_LONGEST_KEY = 1000
_SMALL_ARRAY = 100
_MORE = "..."


def view(obj: Any) -> Any:
    """One level of plain view: the plain equivalent of a record of a known type, else ``obj`` itself.

    Known are numpy arrays and scalars, omegaconf containers and nodes (interpolations stay strings),
    pathlib paths (as str), BytesIO (as bytes), deque, torch.device and torch layouts (as str).  What the
    result contains is not viewed yet.
    """
    if type(obj) is not Record or type(obj.type) is not Global:
        return obj
    known = _VIEWS.get(obj.type.module)
    return obj if known is None else known(obj)


def _omegaconf(record: Record) -> Any:
    # A container whose content is missing, None or an interpolation has None or a string there.
    name = "_val" if record.path.startswith("omegaconf.nodes.") else "_content"
    return record.get(name, record)


def _pathlib(record: Record) -> Any:
    if not all(isinstance(part, str) for part in record.args):
        return record
    return str((PureWindowsPath if "Windows" in record.path else PurePosixPath)(*record.args))


def _bytes_io(record: Record) -> Any:
    state = record.state
    if record.type.name == "BytesIO" and isinstance(state, tuple) and state and isinstance(state[0], bytes):
        return state[0]
    return record


def _torch(record: Record) -> Any:
    if record.path == "torch.device" and len(record.args) == 1:
        return record.args[0]
    if record.path == "torch.device" and len(record.args) == 2:
        kind, index = record.args
        return f"{kind}:{index}" if type(kind) is str and type(index) is int and index < 1 << 16 else record
    if record.path == "torch.serialization._get_layout" and len(record.args) == 1:
        return record.args[0]
    return record


def _deque(record: Record) -> Any:
    return record.items or [] if record.type.name == "deque" else record


_VIEWS: dict[str, Callable[[Record], Any]] = {
    "collections": _deque,
    "omegaconf.base": _omegaconf,
    "omegaconf.dictconfig": _omegaconf,
    "omegaconf.listconfig": _omegaconf,
    "omegaconf.nodes": _omegaconf,
    "pathlib": _pathlib,
    "pathlib._local": _pathlib,
    "_io": _bytes_io,
    "io": _bytes_io,
    "torch": _torch,
    "torch.serialization": _torch,
    **dict.fromkeys(
        [
            "numpy",
            *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")),
        ],
        rebuild,
    ),
}


def simplify(obj: Any) -> Any:
    """A copy in which every record of a known type is its plain view, at any depth.

    Namespaces and dictionary subclasses become dictionaries.  Records of unknown types are copied with their
    contents simplified; anything else (tensors, sets) is taken over as it is.  What was shared stays shared,
    and cycles stay cycles.
    """
    done: dict[int, Any] = {}
    kept: list[Any] = []
    todo: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def result(source: Any) -> Any:
        return done.get(id(source), source)

    def visit(source: Any) -> None:
        if isinstance(source, _SCALARS) or id(source) in done:
            return
        seen = source.fields() if isinstance(source, Record) and source.path in _NAMESPACES else view(source)
        kept.append(source)
        if seen is not source:
            done[id(source)] = seen
            todo.append((alias, (source, seen)))
            todo.append((visit, (seen,)))
        elif isinstance(source, tuple):
            done[id(source)] = source
            todo.append((fill_tuple, (source,)))
            todo.extend((visit, (part,)) for part in source)
        elif isinstance(source, list):
            copy: Any = []
            done[id(source)] = copy
            todo.append((fill_list, (copy, source)))
            todo.extend((visit, (part,)) for part in source)
        elif isinstance(source, dict):
            copy = {}
            done[id(source)] = copy
            todo.append((fill_dict, (copy, source)))
            todo.extend((visit, (part,)) for part in source.values())
        elif isinstance(source, Record):
            copy = Record(source.type, source.args, source.new)
            done[id(source)] = copy
            parts = (source.args, source.kwargs, source.state, source.items, source.pairs)
            todo.append((fill_record, (copy, parts)))
            todo.extend((visit, (part,)) for part in parts)

    def alias(source: Any, seen: Any) -> None:
        done[id(source)] = result(seen)

    def fill_tuple(source: tuple[Any, ...]) -> None:
        done[id(source)] = tuple(map(result, source))

    def fill_list(copy: list[Any], source: list[Any]) -> None:
        copy.extend(map(result, source))

    def fill_dict(copy: dict[Any, Any], source: dict[Any, Any]) -> None:
        copy.update((key, result(value)) for key, value in source.items())

    def fill_record(copy: Record, parts: tuple[Any, ...]) -> None:
        copy.args, copy.kwargs, copy.state, copy.items, copy.pairs = map(result, parts)

    todo.append((visit, (obj,)))
    while todo:
        method, arguments = todo.pop()
        method(*arguments)
    return result(obj)


def to_plain(obj: Any, *, max_nodes: int = 100_000, max_depth: int = 100) -> Any:
    """Data that ``json.dumps`` takes, for display: nothing here can be turned back into the object.

    A record becomes a dictionary of its fields with its type under ``__type__``; a name becomes
    ``"module.name"``; an array or tensor (anything with ``dtype``, ``shape`` and ``nbytes``) a short
    description, an array of at most 100 elements its values; bytes a summary; NaN and infinities strings.
    A part that contains itself is shown as ``"<cycle>"``; beyond ``max_nodes`` values (each hundred
    characters of text count as one more) or ``max_depth`` levels the rest is ``"..."``.
    """
    root: list[Any] = [None]
    left = max_nodes
    active: set[int] = set()
    # Keeps what is looked at alive, so that no identity is reused, with its view, which may cost a copy.
    views: dict[int, tuple[Any, Any]] = {}
    # (source, container to put it in, key there, depth), or (source that the current path leaves,)
    todo: list[tuple[Any, ...]] = [(obj, root, 0, 0)]
    while todo:
        entry = todo.pop()
        if len(entry) == 1:
            active.discard(id(entry[0]))
            continue
        source, target, key, depth = entry
        if isinstance(source, Record):
            if id(source) not in views:
                views[id(source)] = (source, _view_through(source))
            source = views[id(source)][1]
        shown = _leaf(source)
        if shown is not None or source is None:
            target[key] = shown
            left -= len(shown) // _CHARACTERS_PER_NODE if isinstance(shown, str) else 0
        elif id(source) in active:
            target[key] = "<cycle>"
        elif depth >= max_depth or left <= 0:
            target[key] = _MORE
        else:
            active.add(id(source))
            todo.append((source,))
            copy, children = _expand(source, left)
            left -= len(children) + 1
            target[key] = copy
            todo.extend((child, copy, place, depth + 1) for place, child in reversed(children))
    return root[0]


def _view_through(record: Record) -> Any:
    """The view of the view, as a node of a configuration may hold a record; bounded, as it may hold itself."""
    seen: Any = record
    for _ in range(10):
        deeper = view(seen)
        if deeper is seen:
            break
        seen = deeper
    return seen


def _leaf(obj: Any) -> Any:
    """How a value without parts is shown; None for a container."""
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, int):
        return obj if -(1 << 63) <= obj < 1 << 64 else _big(obj)
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(obj, "NaN")
    if isinstance(obj, str):
        text = obj.encode("utf-8", "backslashreplace").decode("utf-8")
        longer = len(text) - _LONGEST_STRING
        return text if longer <= 0 else f"{text[:_LONGEST_STRING]}... ({longer} more characters)"
    if isinstance(obj, Global):
        return obj.path
    if isinstance(obj, (bytes, bytearray)):
        start = obj[:16].hex()
        return f"bytes({len(obj)}): {start}" if len(obj) <= 16 else f"bytes({len(obj)}): {start}..."
    if isinstance(obj, complex):
        return f"{obj.real}{obj.imag:+}j"
    if isinstance(obj, (list, tuple, dict, set, frozenset, Record, range, slice)):
        return None
    if isinstance(obj, np.ndarray) and obj.size <= _SMALL_ARRAY and obj.dtype.kind in "biuf":
        return _leaf_list(obj.tolist())
    if all(hasattr(obj, name) for name in ("dtype", "shape", "nbytes")):
        return f"tensor({list(obj.shape)}, {obj.dtype})"
    return f"<{type(obj).__name__}>"


def _leaf_list(values: Any) -> Any:
    return [_leaf_list(value) for value in values] if isinstance(values, list) else _leaf(values)


def _big(number: int) -> str:
    # Python refuses, and takes quadratic time for, the decimal digits of longer numbers.
    return str(number) if number.bit_length() <= 10_000 else f"int({number.bit_length()} bits)"


def _expand(obj: Any, budget: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """An empty copy of a container, and its parts with their places in it, at most ``budget`` of them."""
    if isinstance(obj, (list, tuple, set, frozenset)):
        parts = list(islice(obj, budget))
        if len(parts) < len(obj):
            parts.append(f"{_MORE} ({len(obj) - len(parts)} more)")
        return [None] * len(parts), list(enumerate(parts))
    pairs: list[tuple[Any, Any]]
    size = 0
    if isinstance(obj, dict):
        size = len(obj)
        pairs = list(islice(obj.items(), budget))
    elif isinstance(obj, (range, slice)):
        pairs = [("__type__", f"builtins.{type(obj).__name__}"), ("args", (obj.start, obj.stop, obj.step))]
    else:
        pairs = [("__type__", obj.type if obj.path == "?" else obj.path), *record_parts(obj)]
    copy: dict[str, Any] = {}
    children = []
    for key, value in pairs:
        base = text = _key(key)[:_LONGEST_KEY]
        number = len(copy)
        while text in copy:
            number += 1
            text = f"{base} ({number})"
        copy[text] = None
        children.append((text, value))
    if len(pairs) < size:
        copy[_MORE] = f"{size - len(pairs)} more"
    return copy, children


def record_parts(record: Record) -> list[tuple[Any, Any]]:
    """What a record holds, by name: its fields, then what there is of arguments, other state, and content."""
    fields = record.fields()
    parts: list[tuple[Any, Any]] = list(fields.items())
    if record.args:
        parts.append(("args", record.args))
    if record.kwargs:
        parts.append(("kwargs", record.kwargs))
    if record.state is not None and not fields and record.state != {}:
        parts.append(("state", record.state))
    if record.items:
        parts.append(("items", record.items))
    if record.pairs:
        parts.append(("pairs", record.pairs))
    return parts


def _key(key: Any) -> str:
    if isinstance(key, tuple):
        return f"({', '.join(_key(part) if not isinstance(part, tuple) else '(...)' for part in key[:16])})"
    if isinstance(key, Record):
        return key.path
    shown = _leaf(key)
    return shown if isinstance(shown, str) else str(shown)
