"""The calls of a pickle that cannot be read: its opcodes followed for what they do to the stack, and nothing refused.

Other software may get past what this package refuses, and runs what comes before a fault in any case.  Strings, names
and tuples are followed, since names are made of strings and calls take tuples; every other object is opaque.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from typing import Any

from anyckpt.pickling.records import Global, Record

_LINES = frozenset(b"FgILpPSVci")
_FIXED = {
    0x80: 1,
    0x95: 8,
    0x47: 8,
    0x4A: 4,
    0x4B: 1,
    0x4D: 2,
    0x68: 1,
    0x6A: 4,
    0x71: 1,
    0x72: 4,
    0x82: 1,
    0x83: 2,
    0x84: 4,
}
_COUNTED = {
    0x42: "<I",
    0x43: "<B",
    0x54: "<i",
    0x55: "<B",
    0x58: "<I",
    0x8A: "<B",
    0x8B: "<i",
    0x8C: "<B",
    0x8D: "<Q",
    0x8E: "<Q",
    0x96: "<Q",
}
_STRINGS = frozenset({0x54, 0x55, 0x58, 0x8C, 0x8D})
_PUSHES = frozenset(
    {
        0x29,
        0x4A,
        0x4B,
        0x4D,
        0x47,
        0x4E,
        0x5D,
        0x7D,
        0x88,
        0x89,
        0x8F,
        0x46,
        0x49,
        0x4C,
        0x50,
        0x97,
        0x42,
        0x43,
        0x8A,
        0x8B,
        0x8E,
        0x96,
    }
)
_EXTENSIONS = {0x82: "<B", 0x83: "<H", 0x84: "<i"}
_TO_MARK = {0x31: 0, 0x65: 0, 0x75: 0, 0x90: 0, 0x64: 1, 0x6C: 1, 0x91: 1}
"""Opcodes that take all down to the mark -> whether they leave an object in its place."""
_TAKES = {0x61: 1, 0x73: 2, 0x62: 1}
_NAME = re.compile(r"[A-Za-z_][\w.]{0,500}\Z")


class _Other:
    """An object that is not followed."""


_OTHER = _Other()


class Outline:
    """Follows one pickle.

    Args:
        data: the pickle, or its beginning.
        name: gives the one ``Global`` for a module and a name.
    """

    def __init__(self, data: bytes, name: Callable[[str, str], Global]) -> None:
        self._data = data
        self._name = name
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.calls: list[tuple[Global | Record, tuple[Any, ...]]] = []

    def follow(self) -> list[tuple[Global | Record, tuple[Any, ...]]]:
        """Every call, as callee and arguments, up to the end or to what no pickle machine can do."""
        at = 0
        try:
            while at < len(self._data) and self._data[at] != 0x2E:
                at = self._step(self._data[at], at + 1)
        except (ValueError, IndexError, KeyError, struct.error, RecursionError):
            pass
        return self.calls

    def _step(self, code: int, at: int) -> int:
        data, stack = self._data, self._stack
        if code in _COUNTED:
            begin = at + struct.calcsize(_COUNTED[code])
            end = begin + int(struct.unpack_from(_COUNTED[code], data, at)[0])
            if not begin <= end <= len(data):
                raise IndexError
            stack.append(data[begin:end].decode("utf-8", "replace") if code in _STRINGS else _OTHER)
            return end
        if code in _LINES:
            return self._line(code, at)
        if code in (0x71, 0x72):  # BINPUT, LONG_BINPUT
            self._memo[data[at] if code == 0x71 else struct.unpack_from("<I", data, at)[0]] = stack[-1]
        elif code in (0x68, 0x6A):  # BINGET, LONG_BINGET
            stack.append(self._memo[data[at] if code == 0x68 else struct.unpack_from("<I", data, at)[0]])
        elif code == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif code in _PUSHES:
            stack.append(_OTHER)
        elif code in _EXTENSIONS:
            number = struct.unpack_from(_EXTENSIONS[code], data, at)[0]
            stack.append(self._name("copyreg", f"extension code {number}"))
        elif code in (0x80, 0x95, 0x98):  # PROTO, FRAME, READONLY_BUFFER
            pass
        elif code in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
            count = code - 0x84
            stack[-count:] = [tuple(stack[-count:])] if len(stack) >= count else [stack[-count]]
        elif code == 0x94:  # MEMOIZE
            self._memo[len(self._memo)] = stack[-1]
        else:
            self._rare(code)
        return at + _FIXED.get(code, 0)

    def _rare(self, code: int) -> None:
        stack = self._stack
        if code == 0x28:  # MARK
            self._marks.append(stack)
            self._stack = []
        elif code == 0x74:  # TUPLE
            self._to_mark().append(tuple(stack))
        elif code in _TO_MARK:
            before = self._to_mark()
            if _TO_MARK[code]:
                before.append(_OTHER)
        elif code in _TAKES:
            if len(stack) <= _TAKES[code]:
                raise IndexError
            del stack[-_TAKES[code] :]
        elif code == 0x30:  # POP
            if stack:
                stack.pop()
            else:
                self._to_mark()
        elif code == 0x32:  # DUP
            stack.append(stack[-1])
        elif code == 0x51:  # BINPERSID
            stack[-1] = _OTHER
        elif code == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack[-1] = self._named(stack[-1], name)
        elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
            arguments = stack.pop()
            stack[-1] = self._called(stack[-1], arguments)
        elif code == 0x92:  # NEWOBJ_EX
            stack.pop()
            arguments = stack.pop()
            stack[-1] = self._called(stack[-1], arguments)
        elif code == 0x6F:  # OBJ
            self._to_mark().append(self._called(stack[0], tuple(stack[1:])))
        else:
            raise ValueError

    def _to_mark(self) -> list[Any]:
        self._stack = self._marks.pop()
        return self._stack

    def _line(self, code: int, at: int) -> int:
        stack = self._stack
        end = self._data.index(b"\n", at)
        line = self._data[at:end]
        if code in b"ci":  # GLOBAL, INST
            second = self._data.index(b"\n", end + 1)
            found = self._named(line.decode(), self._data[end + 1 : second].decode())
            end = second
            if code == 0x69:
                self._to_mark().append(self._called(found, tuple(stack)))
            else:
                stack.append(found)
        elif code == 0x67:  # GET
            stack.append(self._memo[int(line[:20])])
        elif code == 0x70:  # PUT
            self._memo[int(line[:20])] = stack[-1]
        elif code == 0x56:  # UNICODE
            stack.append(line.decode("raw-unicode-escape"))
        elif code == 0x53:  # STRING
            stack.append(bytes(codecs.escape_decode(line[1:-1])[0]).decode("utf-8", "replace"))
        else:
            stack.append(_OTHER)
        return end + 1

    def _named(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise ValueError
        # Behind a fault may lie bytes that are no opcodes; what no one could import is no name.
        return self._name(module, name) if _NAME.match(module) and _NAME.match(name) else _OTHER

    def _called(self, callee: Any, arguments: Any) -> Any:
        if not isinstance(callee, (Global, Record)):
            return _OTHER
        args = arguments if type(arguments) is tuple else ()
        self.calls.append((callee, args))
        return Record(callee, args)
