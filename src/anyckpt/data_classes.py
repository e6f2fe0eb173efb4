"""``dataclass`` as the standard library's, but for when its methods are made: where they are used, not at import.

The standard library writes the source of every method of a data class and compiles it, a third of a millisecond for
each class.  A command imports a hundred classes, and makes a few objects of some.  Here a class costs what finding its
fields does, which is left to the standard library.  Its methods do without source until they were used so often that
compiling pays; then they are the standard library's, and as fast.

Whatever else takes data classes takes these: ``fields``, ``replace`` and ``asdict``, type checkers, pickle, and classes
that inherit from them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from functools import partial
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

_USES = 32
"""Of a method before it is compiled, which takes as long as so many."""


def _dataclass(
    cls: type[Any] | None = None,
    /,
    *,
    repr: bool = True,
    eq: bool = True,
    order: bool = False,
    frozen: bool = False,
    match_args: bool = True,
    kw_only: bool = False,
) -> Any:
    """As ``dataclasses.dataclass``, without ``InitVar`` and slots."""
    options = {"repr": repr, "eq": eq, "order": order, "frozen": frozen, "match_args": match_args, "kw_only": kw_only}
    if cls is None:
        return partial(_dataclass, **options)
    own = dict(vars(cls))
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # else the standard library makes one of the signature
    inherits = any(map(dataclasses.is_dataclass, cls.__mro__[1:]))
    dataclasses.dataclass(
        init=False, repr=False, eq=False, frozen=frozen and inherits, match_args=match_args, kw_only=kw_only
    )(cls)
    cls.__dataclass_params__.frozen = frozen  # for those who inherit, who must be so, too
    methods: dict[str, Any] = {"__init__": _Method(cls, "__init__", _fill, init=True)}
    if repr:
        methods["__repr__"] = _shown
    if eq:
        methods["__eq__"] = _Method(cls, "__eq__", _equal, eq=True)
        if own.get("__hash__") is None:  # that of a class with an ``__eq__`` is None
            own.pop("__hash__", None)
            methods["__hash__"] = _Method(cls, "__hash__", _hash, eq=True) if frozen else None
    if order:
        for compare in (operator.lt, operator.le, operator.gt, operator.ge):
            name = f"__{compare.__name__}__"
            methods[name] = _Method(cls, name, partial(_ordered, compare), eq=True, order=True)
    if frozen:
        methods |= {"__setattr__": _refusing(cls, "assign to"), "__delattr__": _refusing(cls, "delete")}
    for name, method in methods.items():
        if name not in own:
            setattr(cls, name, method)
    return cls


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _dataclass


class _Method:
    """A method of a data class, which is compiled when it was used often, or when someone looks at it.

    Args:
        cls: the class.
        name: of the method.
        general: does the same for any class: takes it, the object, and the method's arguments.
        made_by: what the standard library's decorator makes it for.
    """

    __slots__ = ("_class", "_general", "_left", "_made_by", "_name")

    def __init__(self, cls: type[Any], name: str, general: Callable[..., Any], **made_by: bool) -> None:
        self._class = cls
        self._name = name
        self._general = general
        self._made_by = made_by
        self._left = _USES

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if self._left > 0 and isinstance(instance, self._class):  # ``inspect`` gives the class
            self._left -= 1
            return partial(self._general, self._class, instance)
        method = _compiled(self._class, self._name, **self._made_by)
        setattr(self._class, self._name, method)
        return method.__get__(instance, owner)


def _compiled(cls: type[Any], name: str, **made_by: bool) -> Any:
    """The standard library's method of a class with the same fields."""
    body = {"__module__": cls.__module__, "__doc__": ""}
    if hasattr(cls, "__post_init__"):
        body["__post_init__"] = ""
    options: dict[str, Any] = {"init": False, "repr": False, "eq": False, **made_by}
    made = dataclasses.make_dataclass(
        cls.__qualname__,
        [(field.name, field.type, field) for field in dataclasses.fields(cls)],
        namespace=body,
        frozen=cls.__dataclass_params__.frozen,
        match_args=False,
        **options,
    )
    return vars(made)[name]


def _fill(cls: type[Any], instance: Any, /, *arguments: Any, **named: Any) -> None:
    store = object.__setattr__ if cls.__dataclass_params__.frozen else setattr
    fields = dataclasses.fields(cls)
    positional = [field.name for field in fields if field.init and not field.kw_only]
    given = dict(zip(positional, arguments, strict=False))
    wrong = len(arguments) > len(positional) or not given.keys().isdisjoint(named)
    given.update(named)
    for field in fields:
        if field.init and field.name in given:
            store(instance, field.name, given.pop(field.name))
        elif field.default_factory is not dataclasses.MISSING:
            store(instance, field.name, field.default_factory())
        elif field.init and field.default is not dataclasses.MISSING:
            store(instance, field.name, field.default)
        else:
            wrong = wrong or field.init
    if wrong or given:
        _compiled(cls, "__init__", init=True)(instance, *arguments, **named)  # tells what is wrong
    elif hasattr(cls, "__post_init__"):
        instance.__post_init__()


def _equal(cls: type[Any], instance: Any, other: object) -> Any:
    return _ordered(operator.eq, cls, instance, other)


def _ordered(compare: Callable[[Any, Any], Any], cls: type[Any], instance: Any, other: object) -> Any:
    if other.__class__ is not instance.__class__:
        return NotImplemented
    names = [field.name for field in dataclasses.fields(cls) if field.compare]
    return compare(_values(names, instance), _values(names, other))


def _hash(cls: type[Any], instance: Any) -> int:
    fields = dataclasses.fields(cls)
    return hash(_values([f.name for f in fields if (f.compare if f.hash is None else f.hash)], instance))


def _values(names: Iterable[str], instance: Any) -> tuple[Any, ...]:
    return tuple([getattr(instance, name) for name in names])


@recursive_repr()
def _shown(self: Any) -> str:
    told = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__qualname__}({', '.join(told)})"


def _refusing(cls: type[Any], action: str) -> Callable[..., None]:
    """``__setattr__`` or ``__delattr__`` of a frozen class; a class below it that is none may have more attributes."""
    names = frozenset(field.name for field in dataclasses.fields(cls))
    method = "__delattr__" if action == "delete" else "__setattr__"

    def refuse(self: Any, name: str, *value: Any) -> None:
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot {action} field {name!r}")
        getattr(super(cls, self), method)(name, *value)

    return refuse
