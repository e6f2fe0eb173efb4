"""The state of the pickle machine, and the opcodes that are too rare to be in the interpreter's main loop."""

from __future__ import annotations

import codecs
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Mapping
from typing import Any

from anyckpt.errors import FormatError, UnsafeError
from anyckpt.pickling.alike import Alike, Planned
from anyckpt.pickling.buffered import BufferedPickle, ShortDataError
from anyckpt.pickling.calls import Tally
from anyckpt.pickling.rebuild import CONSTRUCTORS, Constructor
from anyckpt.pickling.records import DictRecord, Global, Record, check_hashable

_MAX_MEMO = 0xFFFFFFFF  # the largest index that LONG_BINPUT can hold
_MAX_DIGITS = 4300  # decimal conversion takes quadratic time; Python itself stops here


class Machine:
    """What a running pickle has besides its stack: marks, memo, names met so far, the caller's functions."""

    __slots__ = (
        "_names",
        "_planned",
        "_protocol",
        "alike",
        "buffer",
        "builders",
        "callers",
        "leave",
        "marks",
        "memo",
        "persistent_load",
        "size",
        "tally",
    )

    def __init__(
        self,
        buffer: BufferedPickle,
        persistent_load: Callable[[Any], Any] | None,
        callers: Mapping[str, Constructor],
        leave: Callable[[int, int], Any] | None = None,
        planned: Mapping[str, Planned] | None = None,
    ) -> None:
        self.buffer = buffer
        self.leave = leave
        self.persistent_load = persistent_load
        self.callers = callers
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Keyed by the identity of a Global, which is far cheaper than hashing it; _names keeps them alive.
        self.builders: dict[int, Constructor] = {}
        self.alike: dict[int, Alike] = {}
        self._planned = planned or {}
        self._names: dict[tuple[str, str], Global] = {}
        # The identity of torch.Size, of which an index has more than of all else.
        self.size = 0
        self.tally = Tally()
        self._protocol = 0

    @property
    def names(self) -> Collection[Global]:
        """Every name that the stream has asked for."""
        return self._names.values()

    def global_name(self, module: str, name: str) -> Global:
        """The one Global of this name in this stream, renamed from Python 2 as ``pickle`` and torch do."""
        if self._protocol < 3:
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[(module, name)]
            else:
                module = IMPORT_MAPPING.get(module, module)
        found = self._names.get((module, name))
        if found is None:
            found = self._names[module, name] = Global(module, name)
            caller = self.callers.get(found.path)
            self.tally.named(found, caller is not None)
            if found.path in self._planned:
                self.alike[id(found)] = Alike(found, self._planned[found.path], self.memo, self.tally)
            if caller is not None:
                self.builders[id(found)] = caller
            elif found.path in CONSTRUCTORS:
                self.builders[id(found)] = CONSTRUCTORS[found.path]
                if found.path == "torch.Size":
                    self.size = id(found)
        return found

    def call(self, callee: Any, args: Any, new: bool) -> Any:
        """The stand-in for ``callee(*args)``, or for ``callee.__new__(callee, *args)``."""
        if type(args) is not tuple:
            raise FormatError("a call has no tuple of arguments", found=type(args).__name__)
        if type(callee) is Global or type(callee) is Record:
            self.tally.called(callee, args)
        build = self.builders.get(id(callee))
        if build is not None:
            built = build(callee, args, new)
            if built is not NotImplemented:
                return built
        elif type(callee) is not Global and type(callee) is not Record:
            raise FormatError("a value is called", expected="a class or function", found=type(callee).__name__)
        return Record(callee, args, new)

    def build(self, target: Any, state: Any) -> None:
        """BUILD on anything but a fresh record."""
        if type(target) is Global:
            raise UnsafeError(f"the attributes of {target.path} itself are changed", expected="those of an instance")
        setter = getattr(target, "set_state", None)
        if setter is None:
            raise FormatError("a state is given to a plain value", found=type(target).__name__)
        setter(state)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """SETITEM and SETITEMS: ``items`` alternates keys and values."""
        if len(items) & 1:
            raise FormatError("a dictionary key has no value")
        halves = iter(items)
        if type(target) is dict or type(target) is DictRecord:
            for key, value in zip(halves, halves, strict=True):
                if type(key) is not str:
                    check_hashable(key)
                target[key] = value
        elif type(target) is Record:
            target.pairs = [*(target.pairs or ()), *zip(halves, halves, strict=True)]
        else:
            raise FormatError("items are set on something that is not a dictionary", found=type(target).__name__)

    def append(self, target: Any, items: list[Any]) -> None:
        """APPEND and APPENDS."""
        if type(target) is list:
            target.extend(items)
        elif type(target) is Record:
            if target.items is None:
                target.items = []
            target.items.extend(items)
        else:
            raise FormatError("items are appended to something that is not a list", found=type(target).__name__)

    def persistent(self, identifier: Any) -> Any:
        """PERSID and BINPERSID."""
        if self.persistent_load is None:
            raise FormatError("a reference to data outside the pickle", expected="a pickle that is complete in itself")
        return self.persistent_load(identifier)

    def rare(self, code: int, at: int, stack: list[Any]) -> tuple[int, list[Any]]:
        """Execute an opcode whose operand starts at ``at``; gives the next position and the current stack.

        Operands are decoded before the stack is touched, so that an opcode cut by the end of a buffer can be
        executed again.
        """
        if code in _COUNTED:
            return self._counted(code, at, stack)
        if code in _TEXT:
            return self._text(code, at, stack)
        if code == 0x80:  # PROTO
            self._protocol = self.buffer.data[at]
            if self._protocol > 5:
                raise FormatError("unknown pickle protocol", expected="0 to 5", found=self._protocol)
            return at + 1, stack
        if code == 0x95:  # FRAME
            length = struct.unpack_from("<Q", self.buffer.data, at)[0]
            left = self.buffer.size - self.buffer.base - at - 8
            if length > left:
                raise FormatError("a frame reaches past the end", expected=f"at most {left} bytes", found=length)
            return at + 8, stack
        if code == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            module = stack.pop()
            if type(name) is not str or type(module) is not str:
                self.tally.note("?.a computed name", 0)
                raise FormatError("a name is not a string")
            stack.append(self.global_name(module, name))
        elif code == 0x92:  # NEWOBJ_EX
            keywords = stack.pop()
            args = stack.pop()
            if type(keywords) is not dict or not all(type(key) is str for key in keywords):
                raise FormatError("keyword arguments are not a dictionary of names")
            made = self.call(stack.pop(), args, True)
            if keywords:
                if type(made) is not Record:
                    raise FormatError("keyword arguments for a type that takes none")
                made.kwargs = keywords
            stack.append(made)
        elif code == 0x8F:  # EMPTY_SET
            stack.append(set())
        elif code == 0x90:  # ADDITEMS
            members, stack = stack, self._pop_mark()
            if type(stack[-1]) is not set:
                raise FormatError("members are added to something that is not a set")
            for member in members:
                check_hashable(member)
            stack[-1].update(members)
        elif code == 0x91:  # FROZENSET
            members, stack = stack, self._pop_mark()
            for member in members:
                check_hashable(member)
            stack.append(frozenset(members))
        elif code == 0x51:  # BINPERSID
            stack.append(self.persistent(stack.pop()))
        elif code == 0x30:  # POP, which also takes back a mark
            if stack:
                stack.pop()
            else:
                stack = self._pop_mark()
        elif code == 0x31:  # POP_MARK
            stack = self._pop_mark()
        elif code == 0x32:  # DUP
            stack.append(stack[-1])
        elif code == 0x6C:  # LIST
            made, stack = stack, self._pop_mark()
            stack.append(made)
        elif code == 0x64:  # DICT
            items, stack = stack, self._pop_mark()
            stack.append({})
            self.set_items(stack[-1], items)
        elif code == 0x6F:  # OBJ
            args, stack = stack, self._pop_mark()
            stack.append(self.call(args[0], tuple(args[1:]), False))
        elif code in (0x82, 0x83, 0x84):  # EXT1, EXT2, EXT4
            raise UnsafeError("a name from the process-wide extension registry is asked for")
        elif code in (0x97, 0x98):  # NEXT_BUFFER, READONLY_BUFFER
            raise FormatError("a buffer outside the pickle is asked for")
        else:
            raise FormatError("unknown opcode", found=f"0x{code:02x}")
        return at, stack

    def _pop_mark(self) -> list[Any]:
        if not self.marks:
            raise FormatError("an opcode needs a mark and there is none")
        return self.marks.pop()

    def _counted(self, code: int, at: int, stack: list[Any]) -> tuple[int, list[Any]]:
        """Opcodes whose operand is a length and that many bytes."""
        data = self.buffer.data
        layout = _COUNTED[code]
        length = struct.unpack_from(layout, data, at)[0]
        begin = at + struct.calcsize(layout)
        if length < 0:
            raise FormatError("a length is negative", found=length)
        if self.leave is not None and length >= _LONG and code in _BYTES:
            if begin + length > self.buffer.size - self.buffer.base:
                raise ShortDataError(begin + length - at)
            stack.append(self.leave(self.buffer.base + begin, length))
            return begin + length, stack
        if begin + length > len(data):
            raise ShortDataError(begin + length - at)
        raw = data[begin : begin + length]
        value: Any = raw
        if code in (0x58, 0x8D):  # BINUNICODE, BINUNICODE8
            value = raw.decode("utf-8", "surrogatepass")
        elif code in (0x54, 0x55):  # BINSTRING, SHORT_BINSTRING
            value = _python2_string(raw)
        elif code in (0x8A, 0x8B):  # LONG1, LONG4
            value = int.from_bytes(raw, "little", signed=True)
        elif code == 0x96:  # BYTEARRAY8
            value = bytearray(raw)
        stack.append(value)
        return begin + length, stack

    def _line(self, at: int, operand: int) -> tuple[bytes, int]:
        data = self.buffer.data
        end = data.find(b"\n", at)
        if end < 0:
            # The line's end lies beyond the buffer, who knows where: ask for twice as much, or for all.
            held, left = len(data) - at, self.buffer.size - self.buffer.base - at
            raise ShortDataError(at - operand + (min(2 * held + 1, left) if held < left else left + 1))
        return data[at:end], end + 1

    def _text(self, code: int, at: int, stack: list[Any]) -> tuple[int, list[Any]]:
        """Opcodes of protocol 0, whose operand is a line of text."""
        line, end = self._line(at, at)
        if code in (0x63, 0x69):  # GLOBAL, INST
            second, end = self._line(end, at)
            found = self.global_name(line.decode("utf-8"), second.decode("utf-8"))
            if code == 0x69:
                args, stack = stack, self._pop_mark()
                stack.append(self.call(found, tuple(args), False))
            else:
                stack.append(found)
        elif code == 0x67:  # GET
            stack.append(self.memo[_number(line)])
        elif code == 0x70:  # PUT
            index = _number(line)
            if not 0 <= index <= _MAX_MEMO:
                raise FormatError("a memo index is out of range", expected=f"0 to {_MAX_MEMO}", found=index)
            self.memo[index] = stack[-1]
        elif code == 0x49:  # INT
            stack.append(line == b"01" if line in (b"00", b"01") else _number(line))
        elif code == 0x4C:  # LONG
            stack.append(_number(line.removesuffix(b"L")))
        elif code == 0x46:  # FLOAT
            stack.append(float(line))
        elif code == 0x56:  # UNICODE
            stack.append(line.decode("raw-unicode-escape"))
        elif code == 0x53:  # STRING
            if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
                raise FormatError("a string is not in quotes")
            stack.append(_python2_string(codecs.escape_decode(line[1:-1])[0]))
        else:  # PERSID
            stack.append(self.persistent(line.decode("utf-8")))
        return end, stack


_COUNTED = {
    0x58: "<I",  # BINUNICODE
    0x8A: "<B",  # LONG1
    0x8B: "<i",  # LONG4
    0x54: "<i",  # BINSTRING
    0x55: "<B",  # SHORT_BINSTRING
    0x42: "<I",  # BINBYTES
    0x43: "<B",  # SHORT_BINBYTES
    0x8D: "<Q",  # BINUNICODE8
    0x8E: "<Q",  # BINBYTES8
    0x96: "<Q",  # BYTEARRAY8
}
_TEXT = frozenset(b"ciFgpILVSP")
_BYTES = frozenset({0x42, 0x54, 0x8E, 0x96})  # BINBYTES, BINSTRING, BINBYTES8, BYTEARRAY8
_LONG = 4096  # bytes that are worth leaving in the file


def _number(line: bytes) -> int:
    if len(line) > _MAX_DIGITS:
        raise FormatError("a number has too many digits", expected=f"at most {_MAX_DIGITS}", found=len(line))
    return int(line)


def _python2_string(raw: bytes) -> str | bytes:
    """Python 2 made no difference between text and bytes; text unless it cannot be."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
