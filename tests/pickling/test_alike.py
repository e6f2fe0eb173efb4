"""Objects that are told by a pattern are those that reading opcode by opcode gives, whatever the bytes are."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.containers.dcp import metadata
from anyckpt.errors import AnyckptError
from anyckpt.pickling import alike, load, reader, recording
from anyckpt.pickling.alike import Alike, Make
from anyckpt.storage.source import MemorySource

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_INDICES = sorted(_FIXTURES.rglob(".metadata"))


class Thing:
    """What is pickled."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Part(Thing):
    """What things have."""


class Seen:
    """What is read in place of a thing."""

    def __init__(self) -> None:
        self.state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state


def _fields(state: Any) -> tuple[str, ...]:
    """Of each number and text of a flat state."""
    found: list[str] = []
    for key, value in state.items():
        found += [key] * (len(value) if isinstance(value, tuple) else type(value) in (int, str))
    return tuple(found)


def _like(fields: Sequence[str], seen: Seen) -> Make | None:
    state = seen.state
    if not isinstance(state, dict) or tuple(fields) != _fields(state):
        return None

    def make(values: list[Any]) -> Seen:
        left = iter(values)
        made = Seen()
        made.state = {
            key: tuple(next(left) for _ in value)
            if isinstance(value, tuple)
            else next(left)
            if type(value) in (int, str)
            else value
            for key, value in state.items()
        }
        return made

    return make


def _read(data: bytes, *, patterns: bool) -> Any:
    """What a pickle gives, and the calls in it; or the error."""
    path = f"{__name__}.Thing"
    with patch.object(reader, "_BIG", 0), recording() as calls:
        try:
            value = load(
                data,
                constructors={path: lambda args: NotImplemented if args else Seen()},
                alike={path: _like} if patterns else {},
                name="t",
            )
        except AnyckptError as error:
            return str(error)
    return _plain(value), [(callee.name, callee.times) for callee in calls]


def _plain(value: Any, around: tuple[Any, ...] = ()) -> Any:
    """What can be compared; a damaged pickle may give a value that is in itself."""
    if any(value is one for one in around):
        return "itself"
    inside = (*around, value)
    if isinstance(value, Seen):
        return "thing", _plain(value.state, inside)
    if isinstance(value, (list, tuple)):
        return type(value), [_plain(one, inside) for one in value]
    if isinstance(value, dict):
        return [(_plain(key, inside), _plain(one, inside)) for key, one in value.items()]
    return repr(value)


_NUMBERS = st.integers(0, 1 << 60) | st.integers(0, 70_000) | st.integers(-5, 5)
_TEXTS = st.sampled_from(["weight", "bias", "name", "where", "ä\x94h", ""])
_STATES = st.fixed_dictionaries(
    {"name": _TEXTS, "where": st.tuples(_NUMBERS, _NUMBERS) | st.tuples(_NUMBERS), "flag": st.booleans() | st.none()},
    optional={"length": _NUMBERS, "part": st.builds(lambda a, b: Part(a=a, b=(b, "x")), _TEXTS, _NUMBERS)},
)


def _things(states: list[dict[str, Any]], *, shared: bool) -> bytes:
    """Their pickle; texts that are ``shared`` are in it once."""
    for state in [] if shared else states:
        state["name"] = "".join([*state["name"]])
    return pickle.dumps([Thing(**state) for state in states], protocol=4)


@pytest.mark.parametrize("texts", [1, 2, 8])
def test_what_has_several_new_texts_is_read_opcode_by_opcode(texts: int) -> None:
    """Where each of them ends would have to be tried with each end of the others."""
    keys = [f"field{n}" for n in range(texts)]
    states = [{"flag": None, **{key: f"{number} of {key}" for key in keys}} for number in range(4)]
    with patch.object(alike, "_Pattern", side_effect=alike._Pattern) as patterns:
        found = _read(_things(states, shared=True), patterns=True)
    assert bool(patterns.call_count) == (texts == 1)
    assert found == _read(_things(states, shared=True), patterns=False)


@settings(max_examples=150, deadline=None)
@given(states=st.lists(_STATES, min_size=1, max_size=12), shared=st.booleans())
def test_patterns_change_nothing(states: list[dict[str, Any]], shared: bool) -> None:
    data = _things(states * 3, shared=shared)
    assert _read(data, patterns=True) == _read(data, patterns=False)


@settings(max_examples=300, deadline=None)
@given(states=st.lists(_STATES, min_size=2, max_size=6), place=st.floats(0, 1), byte=st.integers(0, 255))
def test_patterns_change_nothing_of_a_damaged_pickle(states: list[dict[str, Any]], place: float, byte: int) -> None:
    data = bytearray(_things(states * 3, shared=True))
    data[2 + int(place * (len(data) - 3))] = byte
    assert _read(bytes(data), patterns=True) == _read(bytes(data), patterns=False)


def _ordinary(count: int) -> list[dict[str, Any]]:
    return [{"name": "weight", "where": (number, 1 << 40), "flag": None} for number in range(count)]


def test_what_is_alike_is_read_opcode_by_opcode_only_where_the_memo_may_be_asked_for_it() -> None:
    with patch.object(Alike, "learn", autospec=True, side_effect=Alike.learn) as learn:
        _read(_things(_ordinary(5000), shared=True), patterns=True)
    assert learn.call_count < 100  # the first 256 entries of a memo are always kept


def test_what_no_pattern_finds_is_soon_given_up() -> None:
    states = [{"name": "weight", "where": (1, 2), "flag": Part(a=number * 1.5)} for number in range(3000)]
    data = _things(states, shared=True)
    assert _read(data, patterns=True) == _read(data, patterns=False)


def test_an_object_that_is_met_again_is_the_same_one() -> None:
    things = [Thing(**state) for state in _ordinary(50)]
    data = pickle.dumps([*things, *things[30:]], protocol=4)
    with patch.object(reader, "_BIG", 0):
        found = load(
            data,
            constructors={f"{__name__}.Thing": lambda args: Seen()},
            alike={f"{__name__}.Thing": _like},
            name="t",
        )
    assert all(one is other for one, other in zip(found[30:50], found[50:], strict=True))


@pytest.mark.parametrize("path", _INDICES, ids=lambda path: str(path.parent.relative_to(_FIXTURES)))
def test_indices_of_real_software_are_read_alike(path: Path) -> None:
    def index() -> Any:
        try:
            found = metadata.read_index(MemorySource(path.read_bytes(), "t"))
        except AnyckptError as error:
            return str(error)
        places = {
            name: {offset: (one.path, one.offset, one.length, repr(one.transforms)) for offset, one in items.items()}
            for name, items in found.places.items()
        }
        return found.tensors, found.objects, places, found.paths, found.version, found.warnings

    with patch.object(reader, "_BIG", 0):
        known = index()
        with patch.object(metadata, "_alike", dict):
            assert index() == known
