"""What a pickle calls without naming it: attributes of what it names, bound functions, and what other calls gave.

Whatever does harm is reached by a name, or as an attribute of what a name gives.  Names are recorded as they are asked
for, and so is every attribute that ``getattr`` is asked for by name.  Left are functions that a pickle computes:
``getattr`` handed to something that calls it (``map``, ``reduce``, ``partial``), and a result that is called.  No
pickler writes either, and what they reach is not known before they run, so both have a name that is judged to be code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from anyckpt.pickling.records import DictRecord, Global, Record

GETATTR = Global("builtins", "getattr")
HANDED_ON = "builtins.getattr handed on"
_DEEPEST = 20
_APPLIED = {
    "functools.reduce": 0,
    "builtins.map": 0,
    "builtins.filter": 0,
    "builtins.iter": 0,
    "itertools.starmap": 0,
    "itertools.takewhile": 0,
    "itertools.dropwhile": 0,
    "itertools.filterfalse": 0,
    "itertools.accumulate": 1,
    "itertools.groupby": 1,
    "collections.defaultdict": 0,
    "torch._tensor._rebuild_from_type": 0,
    "torch._tensor._rebuild_from_type_v2": 0,
}
"""What is harmless by itself and calls one of its arguments -> which."""
_HOLDERS = (list, tuple, set, frozenset, dict, Record, DictRecord)


def path_of(callee: Any, *, called: bool = False) -> str:
    """The dotted name of an object, through attributes that are asked for and arguments that are bound.

    Args:
        callee: a name, or what a call gave.
        called: say what a call of it would call.  A call of what a function gave, or of an instance, ends in
            ``__call__``.
    """
    behind: list[str] = []
    for _ in range(_DEEPEST):
        if isinstance(callee, Global):
            return ".".join([callee.path, *reversed(behind)])
        if not isinstance(callee, (Record, DictRecord)):
            break
        args = callee.args
        if callee.type == GETATTR and len(args) in (2, 3):
            behind.append(args[1] if isinstance(args[1], str) else "?")
            callee, called = args[0], False
        elif isinstance(callee.type, Global) and callee.type.name == "partial" and args:
            callee = _bound(callee)
        else:
            # An instance, or what a function gave: its methods are those of the name that made it.
            if called:
                behind.append("__call__")
            callee, called = callee.type, False
    return ".".join(["?", *reversed(behind)])


def _bound(partial: Record | DictRecord) -> Any:
    """The function of a ``functools.partial``: its state has another one if it likes."""
    state = partial.state
    if state is None:
        return partial.args[0]
    return state[0] if isinstance(state, tuple) and state else None


def applied(callee: Global, args: tuple[Any, ...]) -> str | None:
    """The dotted name of a computed function that a harmless one is given to call, if there is one."""
    place = _APPLIED.get(callee.path)
    if place is None or place >= len(args) or not isinstance(args[place], (Record, DictRecord)):
        return None
    return path_of(args[place], called=True)


def applies(callee: Global) -> bool:
    """Whether it is harmless by itself and calls one of its arguments."""
    return callee.path in _APPLIED


def handed_on(calls: Iterable[tuple[Any, tuple[Any, ...]]]) -> tuple[Any, tuple[Any, ...]] | None:
    """The first call that is given ``getattr`` in its arguments, however deep, or in what is called."""
    seen: set[int] = set()
    for callee, args in calls:
        if _holds_getattr([args, callee] if isinstance(callee, Record) else [args], seen):
            return callee, args
    return None


def _holds_getattr(waiting: list[Any], seen: set[int]) -> bool:
    while waiting:
        value = waiting.pop()
        if isinstance(value, Global):
            if value == GETATTR:
                return True
            continue
        if not isinstance(value, _HOLDERS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Record, DictRecord)):
            # As what was called, getattr is where it belongs.
            waiting += [value.args, value.state]
            waiting += [value.type] if isinstance(value.type, Record) else []
        if isinstance(value, Record):
            waiting += [value.kwargs, value.items, value.pairs]
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        else:
            waiting += value
    return False


def may_hold(args: tuple[Any, ...]) -> bool:
    """Whether ``getattr`` can be among the arguments of a call or inside one of them."""
    return any(isinstance(part, _HOLDERS) or (isinstance(part, Global) and part == GETATTR) for part in args)
