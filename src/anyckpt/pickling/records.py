"""Inert stand-ins for what a pickle names: nothing here imports, calls or looks up anything.

A pickle is a small program that builds objects by naming classes and functions and calling them.  The
reader builds these records instead, and the writer turns them back into the same opcodes, so an object of a
class that nobody has installed survives a conversion unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from anyckpt.errors import FormatError, UnsafeError

EMPTY: tuple[()] = ()


class Global:
    """A class, function or constant that a pickle names by module and (maybe dotted) name; never resolved."""

    __slots__ = ("module", "name")

    module: str
    name: str

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def path(self) -> str:
        """``module.name``, the spelling that messages and tables of known types use."""
        return f"{self.module}.{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Global) and self.module == other.module and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.module, self.name))

    def __repr__(self) -> str:
        return f"Global({self.path!r})"


class Record:
    """An object that a pickle builds by calling something, kept as the description of how to build it.

    Equality and hash are by identity, as for a plain Python object: distributed checkpoints use such objects
    as dictionary keys.

    Attributes:
        type: what is called, nearly always a :class:`Global`, a :class:`Record` when itself a result.
        args: the positional arguments.
        new: True when built by ``type.__new__(type, *args)``, False when by ``type(*args)``.
        kwargs: keyword arguments of ``__new__``, or None.
        state: what the pickle hands to ``__setstate__``, or None.
        items: what it appends, or None.
        pairs: the (key, value) pairs that it sets by index, or None.
    """

    __slots__ = ("__weakref__", "args", "items", "kwargs", "new", "pairs", "state", "type")

    type: Any
    args: tuple[Any, ...]
    new: bool
    kwargs: dict[str, Any] | None
    state: Any
    items: list[Any] | None
    pairs: list[tuple[Any, Any]] | None

    def __init__(
        self,
        type: object,
        args: tuple[Any, ...] = EMPTY,
        new: bool = False,
        *,
        state: object = None,
        items: list[Any] | None = None,
        pairs: list[tuple[Any, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.type = type
        self.args = args
        self.new = new
        self.state = state
        self.items = items
        self.pairs = pairs
        self.kwargs = kwargs

    @property
    def path(self) -> str:
        """The dotted name of what is called; ``?`` where that is neither a name nor an attribute of one.

        A class method is pickled as the result of ``getattr(class, name)`` before protocol 4.
        """
        callee = self.type
        if isinstance(callee, Record) and callee.type == Global("builtins", "getattr") and len(callee.args) == 2:
            owner, name = callee.args
            return f"{owner.path}.{name}" if isinstance(owner, Global) and isinstance(name, str) else "?"
        return callee.path if isinstance(callee, Global) else "?"

    def set_state(self, state: object) -> None:
        """Keep what BUILD gives; a second dictionary adds to the first, as ``__dict__.update`` does.

        Raises:
            FormatError: two states that are not both dictionaries.
        """
        if self.state is None:
            self.state = state
        elif isinstance(self.state, dict) and isinstance(state, dict):
            self.state = {**self.state, **state}
        else:
            raise FormatError(f"an object of type {self.path} is given its state twice")

    def fields(self) -> dict[Any, Any]:
        """The attributes: a dictionary state, or both halves of a ``(dict, slots)`` state; else empty."""
        state = self.state
        if isinstance(state, dict):
            return state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            if state[0] is None:
                return state[1]
            if isinstance(state[0], dict):
                return {**state[0], **state[1]}
        return {}

    def get(self, field: str, default: Any = None) -> Any:
        """The attribute ``field``, or ``default``."""
        return self.fields().get(field, default)

    def __repr__(self) -> str:
        return f"<Record {self.path}>"


class DictRecord(dict[Any, Any]):
    """A dictionary of a known subclass (OrderedDict, defaultdict, Counter, ...): use it as a plain dict.

    Attributes:
        type: the subclass.
        args: arguments that it was called with, such as a defaultdict's factory, but not its content.
        new: as for :class:`Record`.
        state: attributes set on the dictionary itself (a state dict carries ``_metadata`` so), or None.
    """

    __slots__ = ("args", "new", "state", "type")

    type: Global
    args: tuple[Any, ...]
    new: bool
    state: Any

    def __init__(self, type: Global, args: tuple[Any, ...] = EMPTY, new: bool = False, *, state: object = None) -> None:
        self.type = type
        self.args = args
        self.new = new
        self.state = state

    def set_state(self, state: object) -> None:
        """As :meth:`Record.set_state`."""
        if isinstance(self.state, dict) and isinstance(state, dict):
            self.state = {**self.state, **state}
        elif self.state is None:
            self.state = state
        else:
            raise FormatError(f"a dictionary of type {self.type.path} is given its state twice")

    def __repr__(self) -> str:
        return f"<DictRecord {self.type.path} of {len(self)}>"


class PersistentId:
    """A reference that a pickle leaves to its container, such as torch's ``("storage", class, key, ...)``."""

    __slots__ = ("id",)

    id: Any

    def __init__(self, id: object) -> None:
        self.id = id

    def __repr__(self) -> str:
        return "<PersistentId>"


class Template:
    """What many values of a pickle are alike in.

    Args:
        make: gives a new value of plain data and records, always the same but for its arguments, which it puts into
            the value as they are.
    """

    __slots__ = ("make",)

    make: Callable[..., object]

    def __init__(self, make: Callable[..., object]) -> None:
        self.make = make


class Filled:
    """A value that a pickle has in full at each place where this stands, as equal objects that are not one.

    What its template says is written the same each time, so that a writer need not go through it again.

    Args:
        template: of the value.
        parts: what ``template.make`` is called with.
    """

    __slots__ = ("parts", "template")

    template: Template
    parts: tuple[Any, ...]

    def __init__(self, template: Template, *parts: object) -> None:
        self.template = template
        self.parts = parts


# Hashing a tuple recurses in C and visits shared parts again and again, so a small hostile file could
# overflow the stack or never end; these types hash in constant time.
_CONSTANT_TIME = frozenset({str, int, float, bool, type(None), bytes, complex, range, Global, Record})
_UNHASHABLE = (list, dict, set, bytearray, slice)
_LOOKED_INTO = (tuple, *_UNHASHABLE)
_KEY_NODES = 1000


def check_hashable(key: object) -> None:
    """Refuse what cannot be a dictionary key or set member, before Python tries to hash it.

    Raises:
        FormatError: the key is, or contains, a list, dictionary, set, bytearray or slice.
        UnsafeError: the key is a tuple of more than a thousand nested parts.
    """
    if type(key) in _CONSTANT_TIME or not isinstance(key, _LOOKED_INTO):
        return
    todo: list[Iterator[object]] = [iter((key,))]
    seen = 0
    while todo:
        part = next(todo[-1], todo)
        if part is todo:
            todo.pop()
            continue
        seen += 1
        if isinstance(part, _UNHASHABLE):
            raise FormatError(f"a {type(part).__name__} cannot be a dictionary key or set member")
        if isinstance(part, tuple):
            todo.append(iter(part))
        if seen > _KEY_NODES or len(todo) > 100:
            raise UnsafeError(f"a dictionary key is a tuple of more than {_KEY_NODES} parts or 100 levels")
