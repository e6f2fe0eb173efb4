"""Writes pickles from plain data and inert records, so that nothing real is ever pickled.

Protocol 2 uses only the opcodes that ``torch.load(weights_only=True)`` accepts (torch 2.13,
``torch/_weights_only_unpickler.py``), with two exceptions that it has no way to express: integers of more
than 255 bytes and tuples that contain themselves through a list.  Protocol 4 is what distributed checkpoints
use for their index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from anyckpt.errors import FormatError, UsageError
from anyckpt.pickling.records import DictRecord, Filled, Global, PersistentId, Record, Template

_PYTHON2_NAMES = {"builtins": "__builtin__", "copyreg": "copy_reg"}
_UINT8 = struct.Struct("<cB").pack  # an opcode and its argument
_UINT16 = struct.Struct("<cH").pack
_INT32 = struct.Struct("<ci").pack
_UINT32 = struct.Struct("<cI").pack
_FLOAT64 = struct.Struct(">cd").pack
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_BATCH = 1000  # as Python's pickler: a reader never has to hold a whole dictionary on its stack


def dumps(
    obj: object,
    *,
    protocol: int = 2,
    name: str = "pickle",
    stand_in: Callable[[Any], Any] | None = None,
) -> bytes:
    """The pickle of ``obj``.

    Args:
        obj: None, bool, int, float, complex, str, bytes, bytearray, range, slice, tuple, list, dict, set,
            frozenset, Global, Record, DictRecord, PersistentId or Filled, nested in any way; objects met twice are
            written once, so what was shared stays shared.
        protocol: 2 or 4.
        name: the file's name, for messages.
        stand_in: called with each object of another type, in the order in which they are written; gives what to
            write in its place.  The same result for the same object keeps what was shared shared.

    Raises:
        UsageError: another type of object and no stand-in for it, or another protocol.
        FormatError: an object that is among its own arguments, or a name that a pickle cannot hold.
    """
    if protocol not in (2, 4):
        raise UsageError(f"pickle protocol {protocol} is not written", path=name, expected="2 or 4")
    return _Writer(protocol, name, stand_in).dump(obj)


class _Writer:
    """Depth first, with a stack of iterators, so that no nesting is too deep.

    What holds others is written by a generator: it emits its opcodes, and gives each part that it waits for to be
    written.  The generators that wait are the stack.  Leaves never put anything there.
    """

    def __init__(self, protocol: int, name: str, stand_in: Callable[[Any], Any] | None) -> None:
        self._protocol = protocol
        self._name = name
        self._stand_in = stand_in
        self._out = bytearray(b"\x80" + bytes([protocol]))
        self._memo: dict[int, int] = {}
        self._texts: dict[str, bytes] = {}  # text, and the opcode that gives it again
        self._globals: dict[Global, bytes] = {}
        self._globals_met: dict[int, bytes] = {}  # the same by identity, which takes no hashing
        self._latest: dict[Template, tuple[_Constant, ...]] = {}  # what each was written as when it was gone through
        self._known: dict[Template, tuple[_Constant, ...]] = {}  # and will always be
        self._count = 0
        self._open: set[int] = set()
        self._kept: list[object] = []

    def dump(self, obj: object) -> bytes:
        waiting: list[Iterator[Any]] = []
        parts: Iterator[Any] = iter((obj,))
        leaf_of, place_of = _LEAVES.get, self._memo.get  # local names: this runs for every value
        while True:
            for part in parts:
                leaf = leaf_of(type(part))
                if leaf is not None:
                    leaf(self, part)
                    continue
                known = place_of(id(part))
                if known is not None:
                    self._get(known)
                    continue
                waiting.append(parts)
                holder = _HOLDERS.get(type(part))
                parts = holder(self, part) if holder is not None else self._other(part)
                break
            else:
                if not waiting:
                    break
                parts = waiting.pop()
        self._out += b"."
        return bytes(self._out)

    def _put(self) -> int:
        index = self._count
        self._count = index + 1
        if self._protocol == 4:
            self._out += b"\x94"
        else:
            self._out += _UINT8(b"q", index) if index < 256 else _UINT32(b"r", index)
        return index

    def _get(self, index: int) -> None:
        self._out += _again(index)

    def _memoize(self, obj: object) -> None:
        self._memo[id(obj)] = self._put()

    def _none(self, obj: None) -> None:
        self._out += b"N"

    def _bool(self, obj: bool) -> None:
        self._out += b"\x88" if obj else b"\x89"

    def _int(self, obj: int) -> None:
        if 0 <= obj < 0x100:
            self._out += _UINT8(b"K", obj)
        elif 0 <= obj < 0x10000:
            self._out += _UINT16(b"M", obj)
        elif -0x80000000 <= obj < 0x80000000:
            self._out += _INT32(b"J", obj)
        else:
            raw = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            length = len(raw)
            self._out += _UINT8(b"\x8a", length) if length < 256 else _INT32(b"\x8b", length)
            self._out += raw

    def _float(self, obj: float) -> None:
        self._out += _FLOAT64(b"G", obj)

    def _str(self, obj: str) -> None:
        known = self._texts.get(obj)
        if known is not None:
            self._out += known
            return
        raw = obj.encode("utf-8", "surrogatepass")
        if self._protocol == 4 and len(raw) < 256:
            self._out += _UINT8(b"\x8c", len(raw))
        elif len(raw) < 1 << 32:
            self._out += _UINT32(b"X", len(raw))
        else:
            raise UsageError("a string of 4 GiB or more cannot be written to a pickle", path=self._name)
        self._out += raw
        self._texts[obj] = _again(self._put())

    def _global(self, obj: Global) -> None:
        known = self._globals_met.get(id(obj))
        if known is not None:
            self._out += known
            return
        known = self._globals.get(obj)
        if known is not None:
            self._out += known
        else:
            known = self._new_global(obj)
        self._kept.append(obj)
        self._globals_met[id(obj)] = known

    def _new_global(self, obj: Global) -> bytes:
        if self._protocol == 4:
            self._str(obj.module)
            self._str(obj.name)
            self._out += b"\x93"
        else:
            module = _PYTHON2_NAMES.get(obj.module, obj.module)
            name = "xrange" if obj.path == "builtins.range" else obj.name
            if "\n" in module + name:
                raise FormatError("a class name contains a line break", path=self._name)
            self._out += b"c" + f"{module}\n{name}\n".encode()
        known = self._globals[obj] = _again(self._put())
        return known

    def _other(self, obj: object) -> Iterator[Any]:
        """What stands in for an object of a type that is not written."""
        if self._stand_in is not None:
            obj = self._stand_in(obj)
            self._kept.append(obj)
        if type(obj) not in _LEAVES and type(obj) not in _HOLDERS:
            kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
            raise UsageError(
                f"an object of type {kind} cannot be written to a pickle",
                path=self._name,
                expected="plain data or an inert record",
            )
        return iter((obj,))

    def _bytes(self, obj: bytes) -> Iterator[Any]:
        if self._protocol == 2:
            return self._reduce(obj, Global("_codecs", "encode"), (obj.decode("latin-1"), "latin1"))
        if len(obj) < 256:
            self._out += _UINT8(b"C", len(obj))
        elif len(obj) < 1 << 32:
            self._out += _UINT32(b"B", len(obj))
        else:
            self._out += b"\x8e" + struct.pack("<Q", len(obj))
        self._out += obj
        self._memoize(obj)
        return iter(())

    def _reduce(self, obj: object, callee: Global, arguments: tuple[Any, ...]) -> Iterator[Any]:
        """A value of a builtin type, written as the call that makes it."""
        self._kept.append(arguments)
        yield callee
        yield arguments
        self._out += b"R"
        self._memoize(obj)

    def _bytearray(self, obj: bytearray) -> Iterator[Any]:
        return self._reduce(obj, Global("builtins", "bytearray"), (bytes(obj),) if obj else ())

    def _complex(self, obj: complex) -> Iterator[Any]:
        return self._reduce(obj, Global("builtins", "complex"), (obj.real, obj.imag))

    def _range(self, obj: range | slice) -> Iterator[Any]:
        return self._reduce(obj, Global("builtins", type(obj).__name__), (obj.start, obj.stop, obj.step))

    def _set(self, obj: set[Any] | frozenset[Any]) -> Iterator[Any]:
        return self._reduce(obj, Global("builtins", type(obj).__name__), (list(obj),))

    def _tuple(self, obj: tuple[Any, ...]) -> Iterator[Any]:
        if not obj:
            self._out += b")"
            return iter(())
        return self._filled_tuple(obj)

    def _filled_tuple(self, obj: tuple[Any, ...]) -> Iterator[Any]:
        if len(obj) > 3:
            self._out += b"("
        yield from obj
        known = self._memo.get(id(obj))
        if known is None:
            self._out += _TUPLES.get(len(obj), b"t")
            self._memoize(obj)
        else:
            # A part of the tuple contained it, and has written it: drop the parts that are on the stack.
            self._out += b"0" * len(obj) if len(obj) <= 3 else b"1"
            self._get(known)

    def _list(self, obj: list[Any]) -> Iterator[Any]:
        self._out += b"]"
        self._memoize(obj)
        return self._appends(obj)

    def _appends(self, items: list[Any]) -> Iterator[Any]:
        for begin in range(0, len(items), _BATCH):
            batch = items[begin : begin + _BATCH]
            if len(batch) > 1:
                self._out += b"("
            yield from batch
            self._out += b"e" if len(batch) > 1 else b"a"

    def _dict(self, obj: dict[Any, Any]) -> Iterator[Any]:
        self._out += b"}"
        self._memoize(obj)
        return self._set_items(obj.items())

    def _set_items(self, items: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
        pairs = list(items)
        for begin in range(0, len(pairs), _BATCH):
            batch = pairs[begin : begin + _BATCH]
            if len(batch) > 1:
                self._out += b"("
            yield from chain.from_iterable(batch)
            self._out += b"u" if len(batch) > 1 else b"s"

    def _record(self, obj: Record | DictRecord) -> Iterator[Any]:
        """The call, and the object's content once it is in the memo."""
        if id(obj) in self._open:
            raise FormatError(f"an object of type {obj.type!r} is among its own arguments", path=self._name)
        self._open.add(id(obj))
        keywords = obj.kwargs if isinstance(obj, Record) else None
        if keywords and self._protocol == 2:
            # Protocol 2 has no NEWOBJ_EX; this function of the standard library does the same.
            arguments = (obj.type, obj.args, keywords)
            self._kept.append(arguments)
            yield Global("copyreg", "__newobj_ex__")
            yield arguments
            self._out += b"R"
        else:
            yield obj.type
            if obj.args:
                yield obj.args
            else:
                self._out += b")"
            if keywords:
                yield keywords
                self._out += b"\x92"
            else:
                self._out += b"\x81" if obj.new else b"R"
        self._open.discard(id(obj))
        self._memoize(obj)
        if isinstance(obj, DictRecord):
            yield from self._set_items(obj.items())
        else:
            if obj.items:
                yield from self._appends(obj.items)
            if obj.pairs:
                yield from self._set_items(obj.pairs)
        if obj.state is not None:
            yield obj.state
            self._out += b"b"

    def _filled(self, obj: Filled) -> Iterator[Any]:
        constants = self._known.get(obj.template)
        return self._gone_through(obj) if constants is None else self._between(constants, obj.parts)

    def _between(self, constants: tuple[_Constant, ...], parts: tuple[Any, ...]) -> Iterator[Any]:
        for written, places, following in constants:
            self._out += written
            self._count += places
            if following is not None:
                yield parts[following]

    def _gone_through(self, obj: Filled) -> Iterator[Any]:
        """All of it, until it is written twice alike: texts, names and objects that it shares were met before then."""
        marks: list[_Mark] = []
        value = obj.template.make(*(_Hole(number, part, marks) for number, part in enumerate(obj.parts)))
        self._kept.append(value)
        marks.append(self._mark())
        yield value
        marks.append(self._mark())
        if self._protocol == 2:
            return  # which numbers every place
        constants = tuple(
            _Constant(bytes(self._out[begin.at : end.at]), end.places - begin.places, end.part)
            for begin, end in zip(marks[::2], marks[1::2], strict=True)
        )
        if self._latest.get(obj.template) == constants:
            self._known[obj.template] = constants
        self._latest[obj.template] = constants

    def _hole(self, hole: _Hole) -> Iterator[Any]:
        hole.marks.append(self._mark(hole.number))
        yield hole.part
        hole.marks.append(self._mark(hole.number))

    def _mark(self, part: int | None = None) -> _Mark:
        return _Mark(len(self._out), self._count, part)

    def _persistent(self, obj: PersistentId) -> Iterator[Any]:
        yield obj.id
        self._out += b"Q"


class _Constant(NamedTuple):
    """A run of a template's bytes, how many places in the memo it takes, and the number of the part that follows."""

    written: bytes
    places: int
    following: int | None


class _Mark(NamedTuple):
    """Bytes written and places taken where a template or a part of it begins or ends, and the number of the part."""

    at: int
    places: int
    part: int | None


class _Hole:
    """Stands for a part while its template is written, and marks where it begins and ends."""

    __slots__ = ("marks", "number", "part")

    def __init__(self, number: int, part: object, marks: list[_Mark]) -> None:
        self.number = number
        self.part = part
        self.marks = marks


def _again(index: int) -> bytes:
    """The opcode that gives what is at a place in the memo."""
    return _UINT8(b"h", index) if index < 256 else _UINT32(b"j", index)


_LEAVES: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): _Writer._none,
    bool: _Writer._bool,
    int: _Writer._int,
    float: _Writer._float,
    str: _Writer._str,
    Global: _Writer._global,
}

_HOLDERS: dict[type, Callable[[_Writer, Any], Iterator[Any]]] = {
    complex: _Writer._complex,
    bytes: _Writer._bytes,
    bytearray: _Writer._bytearray,
    range: _Writer._range,
    slice: _Writer._range,
    tuple: _Writer._tuple,
    list: _Writer._list,
    dict: _Writer._dict,
    set: _Writer._set,
    frozenset: _Writer._set,
    Record: _Writer._record,
    DictRecord: _Writer._record,
    PersistentId: _Writer._persistent,
    Filled: _Writer._filled,
    _Hole: _Writer._hole,
}
"""Those that are written with parts."""
