"""Which names pickles ask for and call, recorded as they are read, whatever becomes of the results.

An attack needs no place in the result: what it calls can be dropped at once, overwritten, or left on the stack.  So the
machine records a callee when it is called, and a name when it is named; where a pickle cannot be read to its end, the
names that follow are collected from its opcodes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import few
from anyckpt.pickling.callees import KINDS, kind_of
from anyckpt.pickling.reach import GETATTR, HANDED_ON, applied, applies, handed_on, may_hold, path_of
from anyckpt.pickling.records import DictRecord, Global, PersistentId, Record

_LONGEST_TEXT = 60
_SHOWN_ARGUMENTS = 4
_MOST_NAMES = 10_000
_MOST_FILES = 100
_MOST_NESTED = 256
_NESTED_BYTES = 64 << 20
_MOST_FOLLOWED = 1_000_000
_OPENERS = frozenset(
    {
        "_io.BytesIO",
        "io.BytesIO",
        "pickle.loads",
        "_pickle.loads",
        "pickle._loads",
        "torch.storage._load_from_bytes",
    }
)
"""What is given the bytes of another pickle."""


@dataclass
class Callee:
    """A name that pickles of a checkpoint ask for.

    Attributes:
        name: module and name, dotted, as today's Python finds it.
        kind: one of ``callees.KINDS``.
        times: calls; 0 if it is only named, to be handed to something else.
        example: the first call as a person would write it, arguments shortened; of what is not known to be harmless.
        files: the first files that ask for it.
    """

    name: str
    kind: str
    times: int = 0
    example: str | None = None
    files: list[str] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """The call if there is one, else the name."""
        return self.example or self.name

    def to_json(self) -> dict[str, Any]:
        """As in ``inspect --json``."""
        return {"name": self.name, "kind": self.kind, "times": self.times, "call": self.example, "files": self.files}


class Calls:
    """All names that the pickles of one checkpoint ask for; may be added to from several threads.

    Attributes:
        pickles: how many pickles were read.
        unread: file -> why names in it may be missing here.
        nested: bytes that pickles hand to something which reads pickles, with where they are.
        read: the files that pickles were read from, as messages call them.
        told: warnings that were given out already.
    """

    def __init__(self) -> None:
        self._callees: dict[str, Callee] = {}
        self._lock = threading.Lock()
        self._nested_bytes = 0
        self.pickles = 0
        self.unread: dict[str, str] = {}
        self.nested: list[tuple[str, bytes]] = []
        self.read: set[str] = set()
        self.told: list[str] = []

    def __iter__(self) -> Iterator[Callee]:
        return iter(sorted(self._callees.values(), key=lambda callee: KINDS.index(callee.kind)))

    def __len__(self) -> int:
        return len(self._callees)

    def of_kind(self, kind: str, *, called: bool = False) -> list[Callee]:
        """Those of a kind, in the order in which they were met; only those that are called if so asked."""
        return [c for c in list(self._callees.values()) if c.kind == kind and (c.times or not called)]

    def add(self, found: Iterable[tuple[str, int, str | None]], file: str) -> None:
        """Count what one pickle asks for: names with the number of calls and an example of one."""
        with self._lock:
            self.pickles += 1
            self.read.add(file.partition(" » ")[0])
            for name, times, example in found:
                self._add(name, times, example, file)

    def _add(self, name: str, times: int, example: str | None, file: str) -> None:
        callee = self._callees.get(name)
        if callee is None:
            if len(self._callees) >= _MOST_NAMES:
                self.unread.setdefault(file, f"more than {_MOST_NAMES:,} names are asked for")
                return
            callee = self._callees[name] = Callee(name, kind_of(name))
        callee.times += times
        callee.example = callee.example or example
        if file not in callee.files and len(callee.files) < _MOST_FILES:
            callee.files.append(file)

    def take(self, others: Calls) -> None:
        """Add what was met when some of the same pickles were read again, with others that were not read before."""
        known = {callee.name: callee.times for callee in self}
        for callee in others:
            for file in callee.files:
                self._add(callee.name, max(0, callee.times - known.get(callee.name, 0)), callee.example, file)
                known[callee.name] = max(callee.times, known.get(callee.name, 0))
        self.nested += others.nested
        self.read |= others.read
        self.unread.update(others.unread)
        self.pickles = max(self.pickles, others.pickles)

    def keep(self, data: bytes, file: str) -> None:
        """Remember the bytes of a pickle within a pickle, within bounds."""
        with self._lock:
            self._nested_bytes += len(data)
            if len(self.nested) >= _MOST_NESTED or self._nested_bytes > _NESTED_BYTES:
                self.unread.setdefault(file, "it holds more pickles within pickles than are looked at")
            else:
                self.nested.append((file, data))

    def warnings(self) -> list[str]:
        """What a user should be told before other software obeys the files, one line each."""
        found = []
        code = self.of_kind("code")
        if code:
            found.append(f"{danger(code)}: find out where the file came from")
        functions = self.of_kind("function", called=True)
        if functions:
            found.append(
                f"torch.load(weights_only=False) would call {_some(functions)}: functions of other packages, of which"
                " anyckpt does not know what they do"
            )
        return found

    def told_with(self, warnings: Iterable[str]) -> list[str]:
        """Other warnings with those about calls, as they are now, in place of those that were given out before."""
        others = [text for text in warnings if text not in self.told]
        self.told = [*self.told, *self.warnings()]
        return [*others, *self.warnings()]


def danger(code: list[Callee]) -> str:
    """That loading runs code, with the calls that do, at most three of them."""
    called = [callee for callee in code if callee.times]
    if not called:
        return (
            f"hands {_some(code)} to whoever loads it with torch.load(weights_only=False), which can run code;"
            " nothing was called here"
        )
    return f"torch.load(weights_only=False) would call {_some(called)}; nothing was called here"


def _some(callees: list[Callee]) -> str:
    return few((callee.shown for callee in callees), 3)


_current: ContextVar[Calls | None] = ContextVar("anyckpt_calls", default=None)


@contextmanager
def recording(calls: Calls | None = None) -> Iterator[Calls]:
    """Record into ``calls``, or into new ones, what every pickle read meanwhile asks for."""
    calls = Calls() if calls is None else calls
    token = _current.set(calls)
    try:
        yield calls
    finally:
        _current.reset(token)


@contextmanager
def read_again() -> Iterator[None]:
    """Record nothing meanwhile: a pickle is read a second time."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Calls | None:
    """What is recorded into now."""
    return _current.get()


class Tally:
    """What one running pickle asks for.

    Attributes:
        times: identity of a ``Global`` -> calls; the machine keeps these alive.
        nested: bytes that are handed to something which reads pickles.
        unread: why something may be missing here, or None.
    """

    __slots__ = ("_examples", "_following", "_results", "_watched", "nested", "times", "unread")

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self._watched: set[int] = set()
        self._examples: dict[int, str] = {}
        # Callees that are themselves results, and names met otherwise: dotted name -> [calls, example].
        self._results: dict[str, tuple[int, str | None]] = {}
        # Calls since getattr was named, of which one may be given it.
        self._following: list[tuple[Any, tuple[Any, ...]]] | None = None
        self.nested: list[bytes] = []
        self.unread: str | None = None

    def named(self, found: Global, answered: bool = False) -> None:
        """A name was asked for; ``answered``: who reads the pickle has a stand-in, which reads what it is given."""
        self.times[id(found)] = 0
        if answered and found.path in _OPENERS:
            return
        if found == GETATTR:
            self._following = []
        if found == GETATTR or found.path in _OPENERS or applies(found) or kind_of(found.path) in ("code", "function"):
            self._watched.add(id(found))

    def only_counts(self, callee: Global) -> bool:
        """Whether nothing but the number of its calls is noted of a name."""
        return id(callee) not in self._watched

    def called(self, callee: Any, args: tuple[Any, ...]) -> None:
        """A call of a name, or of what a call gave."""
        known = id(callee)
        if self._following is not None and (type(callee) is Record or may_hold(args)):
            if len(self._following) < _MOST_FOLLOWED:
                self._following.append((callee, args))
            else:
                self.unread = f"it makes more than {_MOST_FOLLOWED:,} calls beside getattr"
        if type(callee) is Global:
            self.times[known] += 1
            if known in self._watched:
                self._look(callee, args)
        else:
            self.note(path_of(callee, called=True), 1, args)

    def take(self, calls: Iterable[tuple[Any, tuple[Any, ...]]]) -> None:
        """Calls of the same stream found in another way: those that are not known yet count."""
        known = {identity for identity, times in self.times.items() if times}
        for callee, args in calls:
            if id(callee) not in known and (
                type(callee) is Global or path_of(callee, called=True) not in self._results
            ):
                self.called(callee, args)

    def note(self, name: str, times: int, args: tuple[Any, ...] = ()) -> None:
        """A name that is no ``Global`` of the stream."""
        before = self._results.get(name)
        if before is None and len(self._results) >= _MOST_NAMES:
            return
        example = before[1] if before else None
        if example is None and times and kind_of(name) in ("code", "function"):
            example = shown_call(name, args)
        self._results[name] = ((before[0] if before else 0) + times, example)

    def _look(self, callee: Global, args: tuple[Any, ...]) -> None:
        if callee.path in _OPENERS:
            self.nested += [bytes(part) for part in args if isinstance(part, (bytes, bytearray)) and part]
            left = [part for part in args if hasattr(part, "read") and hasattr(part, "size")]  # left in the file
            self.nested += [part.read(0, min(part.size, _NESTED_BYTES + 1)) for part in left]
        computed = applied(callee, args)
        if computed is not None:
            self.note(computed, 0)
        if callee == GETATTR:
            self.note(path_of(Record(callee, args)), 0)
        elif id(callee) not in self._examples and kind_of(callee.path) in ("code", "function"):
            self._examples[id(callee)] = shown_call(callee.path, args)

    def found(self, names: Iterable[Global]) -> Iterator[tuple[str, int, str | None]]:
        """Every name, with calls and an example."""
        for name in names:
            yield name.path, self.times.get(id(name), 0), self._examples.get(id(name))
        for path, (times, example) in self._results.items():
            yield path, times, example
        given = handed_on(self._following or ())
        if given is not None:
            yield HANDED_ON, 1, shown_call(path_of(given[0], called=True), given[1])


def shown_call(name: str, args: tuple[Any, ...]) -> str:
    """A call as a person would write it, arguments shortened."""
    return f"{name}({_shown_parts(args, 2)})"


def _shown_parts(parts: Iterable[Any], depth: int) -> str:
    listed = list(parts)
    texts = [_shown(part, depth) for part in listed[:_SHOWN_ARGUMENTS]]
    return ", ".join(texts + ["..."] * (len(listed) > _SHOWN_ARGUMENTS))


def _shown(value: Any, depth: int) -> str:
    if isinstance(value, (str, bytes)):
        short = value if len(value) <= _LONGEST_TEXT else value[:_LONGEST_TEXT]
        return repr(short) + "..." * (len(value) > _LONGEST_TEXT)
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 100 else "an integer"
    if isinstance(value, Global):
        return value.path
    if isinstance(value, (Record, DictRecord)):
        return f"{path_of(value.type)}({_shown_parts(value.args, depth - 1) if depth else '...'})"
    if isinstance(value, PersistentId):
        return "a reference"
    if isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return f"{opening}{_shown_parts(value, depth - 1) if depth and value else '...' if value else ''}{closing}"
    return f"a {type(value).__name__}"
