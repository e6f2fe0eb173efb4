"""The header of a safetensors file: JSON by the rules of the library's parser, which is serde_json's.

Accepted as it accepts: white space around, a key twice in the metadata, ``null`` for no metadata, keys that nobody
knows.  Refused as it refuses: ``NaN`` and ``Infinity``, numbers beyond a double, ``-0`` for a count, half of a
surrogate pair, 128 levels of nesting.  Stricter than it, as the format's specification says: a tensor's name twice.

Facts: ``safetensors/src/tensor.rs`` of safetensors 0.8, serde_json 1.
"""

from __future__ import annotations

import json
import math
from typing import Any

_NESTING_LIMIT = 127  # levels that serde_json enters
_FIELDS = ("dtype", "shape", "data_offsets")
_METADATA = "__metadata__"


class _Repeated(dict[str, Any]):
    """An object of the header in which keys occur twice."""

    keys_twice: tuple[str, ...] = ()


def parse_header(text: bytes) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Each tensor's entry by its name, with at least its three fields, and the metadata, None if there are none.

    Raises:
        ValueError: it is not valid, with what is wrong.
    """
    plain = text.decode("utf-8")
    try:
        entries = json.loads(
            plain, object_pairs_hook=_entries, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if b"\\ud" in text or b"\\uD" in text:  # JSON can spell half of a pair, which is not text
        json.dumps(entries, ensure_ascii=False).encode("utf-8")
    if isinstance(entries, _Repeated):
        raise ValueError(f"{entries.keys_twice[0]!r} occurs twice")
    metadata = entries.pop(_METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError(f"its {_METADATA} is not a map from text to text")
    for name, entry in entries.items():
        if isinstance(entry, dict) and len(entry) > len(_FIELDS):
            _check_nesting([value for key, value in entry.items() if key not in _FIELDS], 3)
        if isinstance(entry, _Repeated):
            twice = [key for key in entry.keys_twice if key in _FIELDS]
            if twice:
                raise ValueError(f"{twice[0]!r} occurs twice in the entry of {name!r}")
    return entries, metadata


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) == len(pairs):
        return entries
    names = [name for name, _ in pairs]
    repeated = _Repeated(entries)
    repeated.keys_twice = tuple(name for name in entries if names.count(name) > 1)
    return repeated


def _check_nesting(values: list[Any], level: int) -> None:
    """Raise ValueError if objects and lists lie more levels deep than serde_json enters."""
    while values:
        if level > _NESTING_LIMIT and any(isinstance(value, (dict, list)) for value in values):
            raise ValueError("nested too deeply")
        inner = [value for value in values if isinstance(value, (dict, list))]
        children = [value.values() if isinstance(value, dict) else value for value in inner]
        values, level = [child for own in children for child in own], level + 1


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond a double")
    return value


def _whole(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)
