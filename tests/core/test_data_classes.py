"""Our ``dataclass`` does what the standard library's does, before its methods are compiled and after."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from functools import partial
from typing import Any, ClassVar

import pytest

from anyckpt import data_classes
from anyckpt.data_classes import dataclass

Decorator = Callable[..., Any]

OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"frozen": True},
    {"frozen": True, "order": True},
    {"frozen": True, "eq": False},
    {"eq": False, "repr": False, "match_args": False},
    {"frozen": True, "kw_only": True},
)
MANY = 100
"""Calls after which every method is compiled."""


@dataclass(frozen=True)
class Pickled:
    """At the top of a module, where pickle finds it."""

    name: str
    sizes: tuple[int, ...] = ()


def point(made: Decorator, options: dict[str, bool]) -> Any:
    @made(**options)
    class Point:
        kind: ClassVar[str] = "point"
        x: int
        y: int = 2
        labels: list[str] = field(default_factory=list, compare=False)
        hidden: int = field(default=0, repr=False, kw_only=True)
        known: int = field(default=7, init=False)

        @property
        def sum(self) -> int:
            return self.x + self.y

    return Point


def pair(options: dict[str, bool]) -> tuple[Any, Any]:
    return point(dataclass, options), point(dataclasses.dataclass, options)


def outcome(action: Callable[[], Any]) -> Any:
    """A value or the error, as text."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


CALLS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((), {"x": 1}),
    ((), {"y": 3, "x": 1}),
    ((), {"x": 1, "labels": ["a"], "hidden": 5}),
    ((1,), {}),
    ((1, 3, ["a"]), {}),
    ((1, 3), {"hidden": 4}),
    ((), {}),
    ((), {"y": 1}),
    ((1,), {"x": 1}),
    ((1,), {"known": 3}),
    ((1,), {"z": 3}),
    ((1, 2, [], 4), {}),
)


@pytest.mark.parametrize("times", [1, MANY])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_objects_are_made_as_ever(options: dict[str, bool], times: int) -> None:
    ours, theirs = pair(options)
    for arguments, named in CALLS:
        for _ in range(times):
            found = outcome(lambda a=arguments, n=named: vars(ours(*a, **n)))
        expected = outcome(lambda a=arguments, n=named: vars(theirs(*a, **n)))
        assert found == expected
        assert not isinstance(found, dict) or list(found) == list(expected)


@pytest.mark.parametrize("times", [1, MANY])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_they_are_compared_hashed_and_shown_as_ever(options: dict[str, bool], times: int) -> None:
    def told(cls: Any, repeat: int) -> list[Any]:
        one, same, other = cls(x=1), cls(x=1, labels=["b"]), cls(x=2)
        result = []
        for _ in range(repeat):
            result = [
                one == same,
                one == other,
                one == 1,
                one != same,
                outcome(lambda: one < other),
                outcome(lambda: one >= same),
                outcome(lambda: one < 1),
                outcome(lambda: hash(one) == hash(same)) if cls.__hash__ is not None else "no hash",
                outcome(lambda: repr(one).partition(" at 0x")[0]),
            ]
        return result

    ours, theirs = pair(options)
    assert told(ours, times) == told(theirs, 1)


@pytest.mark.parametrize("times", [1, MANY])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_frozen_stays(options: dict[str, bool], times: int) -> None:
    for cls in pair(options):
        for _ in range(times):
            one = cls(x=1)
        for change in (partial(setattr, one, "x", 5), partial(setattr, one, "new", 5), partial(delattr, one, "x")):
            if options.get("frozen"):
                with pytest.raises(FrozenInstanceError, match="cannot (assign to|delete) field '(x|new)'"):
                    change()
            else:
                change()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_standard_library_takes_them(options: dict[str, bool]) -> None:
    ours, theirs = pair(options)
    assert dataclasses.is_dataclass(ours)
    assert [each.name for each in dataclasses.fields(ours)] == [each.name for each in dataclasses.fields(theirs)]
    assert getattr(ours, "__match_args__", None) == getattr(theirs, "__match_args__", None)
    assert dataclasses.asdict(ours(x=1)) == dataclasses.asdict(theirs(x=1))
    assert vars(dataclasses.replace(ours(x=1), y=9)) == vars(dataclasses.replace(theirs(x=1), y=9))
    assert str(inspect.signature(ours)) == str(inspect.signature(theirs))
    assert vars(copy.deepcopy(ours(x=1))) == vars(theirs(x=1))
    assert weakref.ref(one := ours(x=1))() is one


def test_they_are_pickled() -> None:
    one = Pickled("a", (1, 2))
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("made", [dataclass, dataclasses.dataclass])
@pytest.mark.parametrize("frozen", [True, False])
def test_classes_inherit_from_them(made: Decorator, frozen: bool) -> None:
    base = point(dataclass, {"frozen": frozen})

    @made(frozen=frozen)
    class Named(base):  # type: ignore[misc,valid-type]
        name: str = "n"

    for _ in range(MANY):
        one = Named(1, name="a")
    assert (one.x, one.y, one.name, one.sum) == (1, 2, "a", 3)
    assert one == Named(1, name="a") and one != Named(1) and one != base(1)
    assert (hash(one) == hash(Named(1, name="a"))) if frozen else (Named.__hash__ is None)
    with pytest.raises(TypeError, match="cannot inherit"):
        made(frozen=not frozen)(type("Other", (base,), {"__annotations__": {"a": "int"}}))


def test_methods_of_their_own_stay() -> None:
    @dataclass(frozen=True)
    class Own:
        x: int

        def __post_init__(self) -> None:
            object.__setattr__(self, "x", self.x + 1)

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 3

    for _ in range(MANY):
        one = Own(1)
        assert (one.x, repr(one), one == 5, hash(one)) == (2, "own", True, 3)


def test_one_that_holds_itself_is_shown() -> None:
    @dataclass
    class Loop:
        inner: Any = None

    one = Loop()
    one.inner = one
    assert repr(one).endswith("Loop(inner=...)")


def test_nothing_is_compiled_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    made = dataclasses.make_dataclass
    monkeypatch.setattr(dataclasses, "make_dataclass", lambda *a, **k: compiled.append(a[0]) or made(*a, **k))
    cls = point(dataclass, {"frozen": True})
    one = cls(1)
    assert (one, hash(one), repr(one)) == (cls(1), hash(cls(1)), repr(cls(1)))
    assert not compiled
    for _ in range(MANY):
        cls(1)
    assert len(compiled) == 1


def test_uses_are_few_enough() -> None:
    assert data_classes._USES < MANY
