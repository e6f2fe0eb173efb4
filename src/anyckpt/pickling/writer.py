"""Writes pickles from plain data and inert records, so that nothing real is ever pickled.

Protocol 2 uses only the opcodes that ``torch.load(weights_only=True)`` accepts (torch 2.13,
``torch/_weights_only_unpickler.py``), with two exceptions that it has no way to express: integers of more
than 255 bytes and tuples that contain themselves through a list.  Protocol 4 is what distributed checkpoints
use for their index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.errors import FormatError, UsageError
from anyckpt.pickling.records import DictRecord, Global, PersistentId, Record

_PYTHON2_NAMES = {"builtins": "__builtin__", "copyreg": "copy_reg"}
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_MOST_FIELDS = 16
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
            frozenset, Global, Record, DictRecord or PersistentId, nested in any way; objects met twice are
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
    """Depth first with an explicit stack, so that no nesting is too deep.

    An entry of the stack is a method and its arguments, to run once what was pushed after it is written.  What most of
    a pickle consists of is written by recursion, which takes a third of the time, down to some levels; what lies
    deeper is written by the stack alone, so that the recursion has an end.
    """

    def __init__(self, protocol: int, name: str, stand_in: Callable[[Any], Any] | None) -> None:
        self._protocol = protocol
        self._name = name
        self._stand_in = stand_in
        self._out = bytearray(b"\x80" + bytes([protocol]))
        self._memo: dict[int, int] = {}
        self._texts: dict[object, int] = {}
        self._count = 0
        self._todo: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._open: set[int] = set()
        self._kept: list[object] = []
        self._by_stack = False

    def dump(self, obj: object) -> bytes:
        self._later(self._save, obj)
        self._work_off(0)
        self._out += b"."
        return bytes(self._out)

    def _work_off(self, left: int) -> None:
        """Run what is on the stack until so many entries are left."""
        todo = self._todo
        while len(todo) > left:
            method, arguments = todo.pop()
            method(*arguments)

    def _later(self, method: Callable[..., None], *arguments: object) -> None:
        self._todo.append((method, arguments))

    def _emit(self, opcodes: bytes) -> None:
        self._out += opcodes

    def _put(self) -> int:
        index = self._count
        self._count += 1
        if self._protocol == 4:
            self._out += b"\x94"
        else:
            self._out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)
        return index

    def _get(self, index: int) -> None:
        self._out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)

    def _memoize(self, obj: object) -> None:
        self._memo[id(obj)] = self._put()

    def _save(self, obj: object) -> None:
        if not self._by_stack and type(obj) in _RECURSIVE:
            self._write(obj, _LEVELS)
            return
        known = self._memo.get(id(obj))
        if known is not None:
            self._get(known)
            return
        if type(obj) is Record and _is_short(obj):
            self._short(obj)
            return
        save = _SAVERS.get(type(obj))
        if save is None and self._stand_in is not None:
            obj = self._stand_in(obj)
            self._kept.append(obj)
            known = self._memo.get(id(obj))
            if known is not None:
                self._get(known)
                return
            save = _SAVERS.get(type(obj))
        if save is None:
            kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
            raise UsageError(
                f"an object of type {kind} cannot be written to a pickle",
                path=self._name,
                expected="plain data or an inert record",
            )
        save(self, obj)

    def _write(self, obj: Any, levels: int) -> None:
        """Write an object and what is in it, in the order in which the stack does."""
        known = self._memo.get(id(obj))
        if known is not None:
            self._get(known)
            return
        kind = type(obj)
        save = _LEAVES.get(kind)
        if save is not None:
            save(self, obj)
        elif not levels or kind not in _RECURSIVE or (kind is Record and (obj.kwargs or obj.pairs or obj.items)):
            self._write_by_stack(obj)
        elif kind is Record or kind is DictRecord:
            self._write_record(obj, levels - 1)
        elif kind is tuple:
            if len(obj) > 3:
                self._out += b"("
            for part in obj:
                self._write(part, levels - 1)
            if obj:
                self._end_tuple(obj)
            else:
                self._out += b")"
        elif kind is dict:
            self._out += b"}"
            self._memoize(obj)
            self._write_pairs(obj, levels - 1)
        elif kind is list:
            self._out += b"]"
            self._memoize(obj)
            for begin in range(0, len(obj), _BATCH):
                batch = obj[begin : begin + _BATCH]
                if len(batch) > 1:
                    self._out += b"("
                for item in batch:
                    self._write(item, levels - 1)
                self._out += b"a" if len(batch) == 1 else b"e"
        else:
            self._write(obj.id, levels - 1)
            self._out += b"Q"

    def _write_by_stack(self, obj: object) -> None:
        before, self._by_stack = self._by_stack, True
        left = len(self._todo)
        self._later(self._save, obj)
        self._work_off(left)
        self._by_stack = before

    def _write_record(self, obj: Record | DictRecord, levels: int) -> None:
        if id(obj) in self._open:
            self._begin(obj)  # which refuses it
        if obj.args or type(obj.type) is not Global:
            self._open.add(id(obj))
            self._write(obj.type, levels)
            self._write(obj.args, levels)
            self._open.discard(id(obj))
        else:
            self._global(obj.type)
            self._out += b")"
        self._out += b"\x81" if obj.new else b"R"
        self._memoize(obj)
        if isinstance(obj, DictRecord):
            self._write_pairs(obj, levels)
        if obj.state is not None:
            self._write(obj.state, levels)
            self._out += b"b"

    def _write_pairs(self, obj: Mapping[Any, Any], levels: int) -> None:
        """Keys and values with the opcodes that set them."""
        pairs = list(obj.items())
        for begin in range(0, len(pairs), _BATCH):
            batch = pairs[begin : begin + _BATCH]
            if len(batch) > 1:
                self._out += b"("
            for key, value in batch:
                self._write(key, levels)
                self._write(value, levels)
            self._out += b"u" if len(batch) > 1 else b"s"

    def _none(self, obj: None) -> None:
        self._out += b"N"

    def _bool(self, obj: bool) -> None:
        self._out += b"\x88" if obj else b"\x89"

    def _int(self, obj: int) -> None:
        if 0 <= obj < 0x100:
            self._out += b"K" + bytes([obj])
        elif 0 <= obj < 0x10000:
            self._out += b"M" + struct.pack("<H", obj)
        elif -0x80000000 <= obj < 0x80000000:
            self._out += b"J" + struct.pack("<i", obj)
        else:
            raw = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            length = len(raw)
            self._out += b"\x8a" + bytes([length]) if length < 256 else b"\x8b" + struct.pack("<i", length)
            self._out += raw

    def _float(self, obj: float) -> None:
        self._out += b"G" + struct.pack(">d", obj)

    def _str(self, obj: str) -> None:
        known = self._texts.get(obj)
        if known is not None:
            self._get(known)
            return
        raw = obj.encode("utf-8", "surrogatepass")
        if self._protocol == 4 and len(raw) < 256:
            self._out += b"\x8c" + bytes([len(raw)])
        elif len(raw) < 1 << 32:
            self._out += b"X" + struct.pack("<I", len(raw))
        else:
            raise UsageError("a string of 4 GiB or more cannot be written to a pickle", path=self._name)
        self._out += raw
        self._texts[obj] = self._put()

    def _bytes(self, obj: bytes) -> None:
        if self._protocol == 2:
            self._reduce(obj, Global("_codecs", "encode"), (obj.decode("latin-1"), "latin1"))
            return
        if len(obj) < 256:
            self._out += b"C" + bytes([len(obj)])
        elif len(obj) < 1 << 32:
            self._out += b"B" + struct.pack("<I", len(obj))
        else:
            self._out += b"\x8e" + struct.pack("<Q", len(obj))
        self._out += obj
        self._memoize(obj)

    def _reduce(self, obj: object, callee: Global, arguments: tuple[Any, ...]) -> None:
        """A value of a builtin type, written as the call that makes it."""
        self._kept.append(arguments)
        self._later(self._memoize, obj)
        self._later(self._emit, b"R")
        self._later(self._save, arguments)
        self._later(self._save, callee)

    def _bytearray(self, obj: bytearray) -> None:
        self._reduce(obj, Global("builtins", "bytearray"), (bytes(obj),) if obj else ())

    def _complex(self, obj: complex) -> None:
        self._reduce(obj, Global("builtins", "complex"), (obj.real, obj.imag))

    def _range(self, obj: range) -> None:
        self._reduce(obj, Global("builtins", "range"), (obj.start, obj.stop, obj.step))

    def _slice(self, obj: slice) -> None:
        self._reduce(obj, Global("builtins", "slice"), (obj.start, obj.stop, obj.step))

    def _set(self, obj: set[Any] | frozenset[Any]) -> None:
        self._reduce(obj, Global("builtins", type(obj).__name__), (list(obj),))

    def _tuple(self, obj: tuple[Any, ...]) -> None:
        if not obj:
            self._out += b")"
            return
        if len(obj) > 3:
            self._out += b"("
        done = self._leaves(obj)
        self._later(self._end_tuple, obj)
        for part in reversed(obj[done:]):
            self._later(self._save, part)

    def _leaves(self, parts: Sequence[Any]) -> int:
        """Write the numbers, texts and the like that come first, and say how many: they need no place on the stack."""
        for number, part in enumerate(parts):
            save = _LEAVES.get(type(part))
            if save is None:
                return number
            save(self, part)
        return len(parts)

    def _end_tuple(self, obj: tuple[Any, ...]) -> None:
        known = self._memo.get(id(obj))
        if known is None:
            self._out += _TUPLES.get(len(obj), b"t")
            self._memoize(obj)
        else:
            # A part of the tuple contained it, and has written it: drop the parts that are on the stack.
            self._out += b"0" * len(obj) if len(obj) <= 3 else b"1"
            self._get(known)

    def _list(self, obj: list[Any]) -> None:
        self._out += b"]"
        self._memoize(obj)
        self._appends(obj)

    def _appends(self, items: list[Any]) -> None:
        for begin in reversed(range(0, len(items), _BATCH)):
            batch = items[begin : begin + _BATCH]
            self._later(self._emit, b"a" if len(batch) == 1 else b"e")
            for item in reversed(batch):
                self._later(self._save, item)
            if len(batch) > 1:
                self._later(self._emit, b"(")

    def _dict(self, obj: dict[Any, Any]) -> None:
        self._out += b"}"
        self._memoize(obj)
        self._set_items(list(obj.items()))

    def _set_items(self, pairs: list[tuple[Any, Any]]) -> None:
        for begin in reversed(range(0, len(pairs), _BATCH)):
            batch = pairs[begin : begin + _BATCH]
            self._later(self._items, batch)

    def _items(self, batch: list[tuple[Any, Any]]) -> None:
        """Keys and values with the opcode that sets them."""
        marked = len(batch) > 1
        if marked:
            self._out += b"("
        flat = [part for pair in batch for part in pair]
        done = self._leaves(flat)
        self._later(self._emit, b"u" if marked else b"s")
        for part in reversed(flat[done:]):
            self._later(self._save, part)

    def _global(self, obj: Global) -> None:
        known = self._texts.get(obj)
        if known is not None:
            self._get(known)
            return
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
        self._texts[obj] = self._put()

    def _begin(self, obj: Record | DictRecord) -> None:
        """Write the call; the object's content follows once it is in the memo."""
        if id(obj) in self._open:
            raise FormatError(f"an object of type {obj.type!r} is among its own arguments", path=self._name)
        keywords = obj.kwargs if isinstance(obj, Record) else None
        if not keywords and not obj.args and type(obj.type) is Global:  # most of an index: nothing to wait for
            self._global(obj.type)
            self._out += b")"
            self._made(obj, b"\x81" if obj.new else b"R")
            return
        self._open.add(id(obj))
        if keywords and self._protocol == 2:
            # Protocol 2 has no NEWOBJ_EX; this function of the standard library does the same.
            arguments: tuple[Any, ...] = (obj.type, obj.args, keywords)
            self._kept.append(arguments)
            parts, opcode = [Global("copyreg", "__newobj_ex__"), arguments], b"R"
        elif keywords:
            parts, opcode = [obj.type, obj.args, keywords], b"\x92"
        else:
            parts, opcode = [obj.type, obj.args], b"\x81" if obj.new else b"R"
        self._later(self._made, obj, opcode)
        for part in reversed(parts):
            self._later(self._save, part)

    def _short(self, obj: Record) -> None:
        """Write a short record at once, byte for byte as ``_begin`` has it written."""
        known = self._memo.get(id(obj))
        if known is not None:
            self._get(known)
            return
        self._global(obj.type)
        self._short_tuple(obj.args)
        self._out += b"\x81" if obj.new else b"R"
        self._memoize(obj)
        if obj.state is None:
            return
        known = self._memo.get(id(obj.state))
        if known is not None:
            self._get(known)
        else:
            self._out += b"}"
            self._memoize(obj.state)
            self._out += b"(" if len(obj.state) > 1 else b""
            for key, value in obj.state.items():
                self._str(key)
                self._short(value) if type(value) is Record else _LEAVES[type(value)](self, value)
            self._out += b"u" if len(obj.state) > 1 else b"s"
        self._out += b"b"

    def _short_tuple(self, parts: tuple[Any, ...]) -> None:
        known = self._memo.get(id(parts))
        if known is not None:
            self._get(known)
        elif not parts:
            self._out += b")"
        else:
            self._out += b"(" if len(parts) > 3 else b""
            for part in parts:
                self._short_tuple(part) if type(part) is tuple else _LEAVES[type(part)](self, part)
            self._out += _TUPLES.get(len(parts), b"t")
            self._memoize(parts)

    def _made(self, obj: Record | DictRecord, opcode: bytes) -> None:
        self._out += opcode
        self._open.discard(id(obj))
        self._memoize(obj)
        if obj.state is not None:
            self._later(self._emit, b"b")
            self._later(self._save, obj.state)
        if type(obj) is Record and not obj.pairs and not obj.items:
            return
        if isinstance(obj, DictRecord):
            self._set_items(list(obj.items()))
        else:
            if obj.pairs:
                self._set_items(obj.pairs)
            if obj.items:
                self._appends(obj.items)

    def _persistent(self, obj: PersistentId) -> None:
        self._later(self._emit, b"Q")
        self._later(self._save, obj.id)


_SAVERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): _Writer._none,
    bool: _Writer._bool,
    int: _Writer._int,
    float: _Writer._float,
    complex: _Writer._complex,
    str: _Writer._str,
    bytes: _Writer._bytes,
    bytearray: _Writer._bytearray,
    range: _Writer._range,
    slice: _Writer._slice,
    tuple: _Writer._tuple,
    list: _Writer._list,
    dict: _Writer._dict,
    set: _Writer._set,
    frozenset: _Writer._set,
    Global: _Writer._global,
    Record: _Writer._begin,
    DictRecord: _Writer._begin,
    PersistentId: _Writer._persistent,
}

_RECURSIVE = {tuple, list, dict, Record, DictRecord, PersistentId}
_LEVELS = 30
_LEAVES = {kind: _SAVERS[kind] for kind in (type(None), bool, int, float, str, Global)}
"""Those that never put anything on the stack."""


def _is_short(obj: Record) -> bool:
    """Whether a record is a call with leaves, and its state some leaves and such calls by name: most of an index is."""
    state = obj.state
    if obj.kwargs or obj.items or obj.pairs or type(obj.type) is not Global:
        return False
    for part in obj.args:
        if type(part) not in _LEAVES and (type(part) is not tuple or any(type(one) not in _LEAVES for one in part)):
            return False
    if state is None:
        return True
    if type(state) is not dict or not 0 < len(state) <= _MOST_FIELDS:
        return False
    for key, value in state.items():
        if type(key) is not str:
            return False
        if type(value) not in _LEAVES and (
            type(value) is not Record or value.state is not None or not _is_short(value)
        ):
            return False
    return True
