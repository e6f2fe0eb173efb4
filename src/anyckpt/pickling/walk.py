"""Finding things in nested data, by an iterative walk that neither depth nor cycles can break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from anyckpt.errors import FormatError
from anyckpt.pickling.plain import record_parts
from anyckpt.pickling.records import DictRecord, Global, Record

_DEEPEST = 1000
_NEVER = (str, int, float, complex, bytes, bytearray, type(None), Global)
Path = tuple[Any, ...]


def find_leaves(obj: Any, match: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    """Every object for which ``match`` is true, with the path of keys and indices that leads to it, in order.

    The walk enters dictionaries, lists, tuples, sets and records (a field by its name; arguments under
    ``"args"``, a state without names under ``"state"``, appended items and set pairs under ``"items"`` and
    ``"pairs"``).  A match is not entered, and is found again at each place from which it is referred to; a
    container that is shared is entered once, at the first place.  Numbers, text and bytes are not offered.

    Raises:
        FormatError: a match lies more than 1000 levels deep.
    """
    visited: set[int] = set()
    path: list[Any] = []
    todo: list[Iterator[tuple[Any, Any]]] = [iter([(None, obj)])]
    while todo:
        step = next(todo[-1], None)
        if step is None:
            todo.pop()
            if path:
                path.pop()
            continue
        key, child = step
        if isinstance(child, _NEVER):
            continue
        if match(child):
            if len(path) > _DEEPEST:
                raise FormatError("an object is nested too deep", expected=f"at most {_DEEPEST} levels")
            yield (*path[1:], key) if path else (), child
        elif id(child) not in visited:
            parts = _parts(child)
            if parts is not None:
                visited.add(id(child))
                todo.append(iter(parts))
                path.append(key)


def _parts(obj: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(obj, DictRecord):
        return [*obj.items(), ("__dict__", obj.state)]
    if isinstance(obj, dict):
        return obj.items()
    if isinstance(obj, (list, tuple, set, frozenset)):
        return enumerate(obj)
    if isinstance(obj, Record):
        return record_parts(obj)
    return None
