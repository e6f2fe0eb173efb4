"""Containers of the kind that they were: tuples, subclasses of dictionaries, objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.containers.torch_file.values import spelled
from anyckpt.pickling import DictRecord, Record


def rebuilt(original: Any, parts: Mapping[Any, Any]) -> Any:
    """A container of the same kind as one that was read, with these parts.

    Args:
        original: the container; None for a plain one.
        parts: what it holds now, by key, index or part of a record.
    """
    if isinstance(original, DictRecord):
        result = DictRecord(original.type, original.args, original.new, state=original.state)
        result.update(parts)
        return result
    if isinstance(original, tuple):
        return tuple(parts[index] for index in sorted(parts))
    if isinstance(original, list):
        return [parts[index] for index in sorted(parts)]
    if isinstance(original, Record):
        return _record(original, parts)
    return dict(parts)


def _record(original: Record, parts: Mapping[Any, Any]) -> Record:
    state = original.state
    named = original.fields()
    if isinstance(state, tuple) and named:
        dictionary, slots = state
        state = (None if dictionary is None else _kept(dictionary, parts), _kept(slots, parts))
    elif named:
        state = _kept(state, parts)
    elif "state" in parts:
        state = parts["state"]
    return Record(
        original.type,
        parts["args"] if original.args and "args" in parts else original.args,
        original.new,
        state=state,
        items=parts["items"] if original.items and "items" in parts else original.items,
        pairs=parts["pairs"] if original.pairs and "pairs" in parts else original.pairs,
        kwargs=parts["kwargs"] if original.kwargs and "kwargs" in parts else original.kwargs,
    )


def _kept(fields: Mapping[Any, Any], parts: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: parts[spelled(key)] for key in fields if spelled(key) in parts}
