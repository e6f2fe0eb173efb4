"""Objects that a pickle has by the million, recognized by a pattern of their bytes.

The chunks of a distributed checkpoint are written by the same opcodes and differ in numbers and texts only.  When the
machine has read one opcode by opcode, a regular expression is made of its bytes in which these may be others; wherever
it matches, the next one is made of what it finds, and the machine goes on behind it.  What does not match is read as
ever, so that being right never depends on a pattern: its opcodes are those that were executed once, and every name and
key in it is the same entry of the memo.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.pickling.calls import Tally
from anyckpt.pickling.rebuild import CONSTRUCTORS
from anyckpt.pickling.records import Global

Make = Callable[[list[Any]], Any]
"""From the numbers and texts of an object, in the order of the stream, to the object."""
Planned = Callable[[Sequence[str], Any], "Make | None"]
"""From the fields of the state that the numbers and texts of an object are in, and the object, to what makes others of
which only these differ; None if they are not understood."""

_MOST_PATTERNS = 16
_TRIED = 1000  # objects after which it shows whether patterns find them
_LONGEST = 4096  # bytes of an object

_BININT1, _BININT2, _BININT, _LONG1 = 0x4B, 0x4D, 0x4A, 0x8A
_BINGET, _LONG_BINGET, _SHORT_BINUNICODE = 0x68, 0x6A, 0x8C
_NUMBERS = frozenset({_BININT1, _BININT2, _BININT, _LONG1})
_TEXTS = frozenset({_BINGET, _LONG_BINGET, _SHORT_BINUNICODE})
_MARK, _NEWOBJ, _REDUCE, _BUILD, _MEMOIZE, _SETITEMS, _TUPLE = 0x28, 0x81, 0x52, 0x62, 0x94, 0x75, 0x74
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_EMPTY_DICT = 0x7D
_CONSTANTS = frozenset(b")N\x88\x89") | {_EMPTY_DICT}  # an empty tuple, None, True, False
_OPERANDS = {_BININT1: 1, _BININT2: 2, _BININT: 4, _BINGET: 1, _LONG_BINGET: 4}
"""Bytes after an opcode; after those with a length, as many as it says."""

_NUMBER = (
    rb"(K.|M..|J...[\x00-\x7f]|\x8a(?:\x04...[\x00-\x7f]|\x05.{4}[\x00-\x7f]|\x06.{5}[\x00-\x7f]|\x07.{6}[\x00-\x7f]))"
)
"""From 0 to 2**55; others are read opcode by opcode."""
_KNOWN_TEXT = rb"(h.|j....)"
_NEW_TEXT = rb"(\x8c.{1,256}?)"
"""Its end is found by trying, so that a pattern has one of these at most: with more of them, a hostile file could have
it try for years."""


class _OtherwiseError(Exception):
    """What a pattern found is not what it looks like."""


class _Values(dict[bytes, Any]):
    """Opcodes with their operands, and the numbers and texts that they give; the common ones are kept."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = memo

    def __missing__(self, token: bytes) -> Any:
        code = token[0]
        if code == _BININT:
            return int.from_bytes(token[1:], "little")
        if code == _LONG1:
            return int.from_bytes(token[2:], "little")
        value: Any
        if code in (_BININT1, _BININT2):
            value = int.from_bytes(token[1:], "little")
        elif code == _SHORT_BINUNICODE:
            if len(token) != 2 + token[1]:
                raise _OtherwiseError
            value = token[2:].decode("utf-8", "surrogatepass")
        else:
            value = self._memo.get(int.from_bytes(token[1:], "little"))
            if type(value) is not str:
                raise _OtherwiseError
        self[token] = value
        return value


class _Pattern:
    """Objects that are written in one way.

    Attributes:
        match: finds one behind the opcode that makes it.
        make: makes it.
        places: how many places of the memo it takes.
        calls: identity of a ``Global`` -> calls that it takes.
        found: how many there were.
    """

    __slots__ = ("calls", "found", "make", "match", "places")

    def __init__(self, expression: bytes, make: Make, places: int, calls: Mapping[int, int]) -> None:
        self.match = re.compile(expression, re.DOTALL).match
        self.make = make
        self.places = places
        self.calls = calls
        self.found = 0


class Alike:
    """The objects of one class.

    Args:
        callee: the class.
        planned: how others are made.
        memo: of the machine, of which no entry is ever another one later.
        tally: of the machine.
    """

    def __init__(self, callee: Global, planned: Planned, memo: Mapping[int, Any], tally: Tally) -> None:
        self._callee = callee
        self._planned = planned
        self._memo = memo
        self._tally = tally
        self._value_of = _Values(memo).__getitem__
        self._patterns: list[_Pattern] = []
        self._missed = 0

    def next(self, data: bytes, at: int, used: bytearray, count: int) -> tuple[Any, int, int] | None:
        """The object of which ``data`` goes on at ``at``, behind NEWOBJ, where it ends, and how many places it takes.

        None if no pattern matches, or an entry of the memo that it fills may be asked for.

        Args:
            used: which entries may be.
            count: how many there are before.
        """
        for pattern in self._patterns:
            found = pattern.match(data, at)
            if found is None or used.find(1, count, count + pattern.places) >= 0:
                continue
            try:
                made = pattern.make(list(map(self._value_of, found.groups())))
            except (_OtherwiseError, UnicodeDecodeError):
                continue
            pattern.found += 1
            if pattern is not self._patterns[0]:  # neighbours are mostly alike
                self._patterns.remove(pattern)
                self._patterns.insert(0, pattern)
            return made, found.end(), pattern.places
        self._missed += 1
        return None

    def learn(self, data: bytes, begin: int, end: int, made: Any, size: int) -> None:
        """Take as an example an object whose bytes behind NEWOBJ were executed, to the end of its BUILD.

        Args:
            size: the identity of ``torch.Size``, which gives its argument.
        """
        if self._missed > max(_TRIED, sum(pattern.found for pattern in self._patterns)):
            self.count()
            self._patterns = []
            return
        if len(self._patterns) >= _MOST_PATTERNS or end - begin > _LONGEST:
            return
        sketch = _Sketch(self._memo, self._tally, size)
        if not sketch.follow(data[begin:end]) or sketch.expression().count(_NEW_TEXT) > 1:
            return
        make = self._planned(sketch.fields(), made)
        if make is not None:
            sketch.calls[id(self._callee)] += 1
            self._patterns.append(_Pattern(sketch.expression(), make, sketch.places, sketch.calls))

    def count(self) -> None:
        """Tell the tally of the calls of all objects that were found."""
        for pattern in self._patterns:
            for callee, times in pattern.calls.items():
                self._tally.times[callee] += times * pattern.found
            pattern.found = 0


_Value = list[int]
"""Of a value on the stack, the opcodes that gave the numbers, texts and names in it."""


class _Made(_Value):
    """A dictionary or object that the opcodes made themselves, and may change."""


class _Sketch:
    """Follows the opcodes of an object without making it, to tell which of its numbers and texts are in which field.

    Attributes:
        places: how many places of the memo it takes.
        calls: identity of a ``Global`` -> calls.
    """

    def __init__(self, memo: Mapping[int, Any], tally: Tally, size: int) -> None:
        self._memo = memo
        self._tally = tally
        self._size = size
        self._opcodes: list[bytes] = []  # each with its operand
        self._fields: dict[int, str] = {}  # opcodes that may give another number or text, and the field that it is in
        self._stack: list[_Value] = [_Made()]
        self._marks: list[int] = []
        self.places = 0
        self.calls: Counter[int] = Counter()

    def follow(self, data: bytes) -> bool:
        """Whether all opcodes are known, and give one object and nothing else."""
        at = 0
        try:
            while at < len(data):
                code = data[at]
                length = 1 + data[at + 1] if code in (_LONG1, _SHORT_BINUNICODE) else _OPERANDS.get(code, 0)
                self._opcodes.append(data[at : at + 1 + length])
                at += 1 + length
                if not self._execute(code):
                    return False
        except IndexError:
            return False
        return len(self._stack) == 1 and not self._marks

    def fields(self) -> tuple[str, ...]:
        """The field of the state that each number and text is in that may be another one, in their order."""
        return tuple(self._fields[number] for number in sorted(self._fields))

    def expression(self) -> bytes:
        """What the bytes of alike objects match."""
        return b"".join(
            _group(opcode) if number in self._fields else re.escape(opcode)
            for number, opcode in enumerate(self._opcodes)
        )

    def _execute(self, code: int) -> bool:
        stack, number = self._stack, len(self._opcodes) - 1
        if code in _NUMBERS or code in _TEXTS:
            if code in _NUMBERS:
                self._fields[number] = ""
            stack.append([number])
        elif code in _CONSTANTS:
            stack.append(_Made() if code == _EMPTY_DICT else [])
        elif code in _TUPLES:
            self._join(len(stack) - _TUPLES[code])
        elif code == _MEMOIZE:
            self.places += 1
        elif code == _MARK:
            self._marks.append(len(stack))
        elif code == _TUPLE:
            self._join(self._marks.pop())
        elif code == _SETITEMS:
            return self._set_items(stack[self._marks.pop() :])
        elif code in (_NEWOBJ, _REDUCE):
            return self._call(code == _NEWOBJ)
        elif code == _BUILD:
            state = stack.pop()
            stack[-1] += state
            return type(stack[-1]) is _Made
        else:
            return False
        return True

    def _join(self, begin: int) -> None:
        """Make one value of those from a place in the stack on."""
        if begin < 0:
            raise IndexError
        self._stack[begin:] = [[number for value in self._stack[begin:] for number in value]]

    def _set_items(self, items: list[_Value]) -> bool:
        """Keys have to be known texts; a value that is a text may be another one."""
        del self._stack[len(self._stack) - len(items) :]
        if len(items) % 2 or type(self._stack[-1]) is not _Made:
            return False
        for key, value in zip(items[::2], items[1::2], strict=True):
            name = self._known(key)
            if type(name) is not str:
                return False
            if len(value) == 1 and (self._is_new(value) or type(self._known(value)) is str):
                self._fields[value[0]] = name
            self._fields.update((number, name) for number in value if number in self._fields)
            self._stack[-1] += value
        return True

    def _call(self, new: bool) -> bool:
        """A name is called: of an object that nobody has another stand-in for, or ``torch.Size``."""
        arguments = self._stack.pop()
        callee = self._known(self._stack.pop())
        if type(callee) is not Global or not self._tally.only_counts(callee):
            return False
        if (callee.path in CONSTRUCTORS) if new else (id(callee) != self._size):
            return False
        self.calls[id(callee)] += 1
        self._stack.append(_Made(arguments) if new else arguments)
        return True

    def _known(self, value: _Value) -> Any:
        """The entry of the memo that a value is; None if it is none."""
        if len(value) != 1:
            return None
        opcode = self._opcodes[value[0]]
        return self._memo.get(int.from_bytes(opcode[1:], "little")) if opcode[0] in (_BINGET, _LONG_BINGET) else None

    def _is_new(self, value: _Value) -> bool:
        return self._opcodes[value[0]][0] == _SHORT_BINUNICODE


def _group(opcode: bytes) -> bytes:
    """What matches an opcode that gives a number or text, whichever it is."""
    if opcode[0] in _NUMBERS:
        return _NUMBER
    return _NEW_TEXT if opcode[0] == _SHORT_BINUNICODE else _KNOWN_TEXT
