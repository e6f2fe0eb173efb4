"""The main loop of the pickle machine.

Distributed checkpoints carry an index of up to a hundred million opcodes, so the frequent ones are executed
in place, in a chain of comparisons ordered by how often they occur in such an index (measured on files of
Megatron-Core 0.12 to 0.16 and torch.save); a table of functions is half as fast.  Objects that are like one before are
taken as a whole (``alike``).
"""

from __future__ import annotations

import struct
from typing import Any

from anyckpt.pickling.alike import Alike
from anyckpt.pickling.buffered import ShortDataError
from anyckpt.pickling.opcodes import Machine
from anyckpt.pickling.records import EMPTY, Global, Record, check_hashable

_u16 = struct.Struct("<H").unpack_from
_i32 = struct.Struct("<i").unpack_from
_u32 = struct.Struct("<I").unpack_from
_f64 = struct.Struct(">d").unpack_from


class KeepAllError(Exception):
    """The stream uses the memo in a way that the superset of used entries does not cover."""


def execute(machine: Machine, used: bytearray | None) -> tuple[Any, int]:
    """Run the stream from the buffer's current opcode; gives the object and the offset after STOP.

    Args:
        machine: the buffer to read from and the caller's functions.
        used: which memo entries may be read back, where MEMOIZE fills the memo; None keeps all.

    Raises:
        KeepAllError: ``used`` cannot be relied on; run again with None.
        Exception: whatever a malformed stream makes Python raise; the buffer then knows the opcode.
    """
    buffer = machine.buffer
    marks = machine.marks
    memo = machine.memo
    builders = machine.builders
    times = machine.tally.times
    alike = machine.alike if used is not None else {}
    begun: list[tuple[Any, Alike, int]] = []  # objects that have no state yet and may be alike, and where it begins
    stack: list[Any] = []
    count = 0
    data = buffer.data
    start = at = buffer.opcode
    try:
        while True:
            try:
                while True:
                    start = at
                    code = data[at]
                    at += 1
                    if code == 0x94:  # MEMOIZE
                        if used is None:
                            memo[len(memo)] = stack[-1]
                        else:
                            if used[count]:
                                memo[count] = stack[-1]
                            count += 1
                    elif code >= 0x80:
                        if code == 0x85:  # TUPLE1
                            stack[-1] = (stack[-1],)
                        elif code == 0x81:  # NEWOBJ
                            args = stack.pop()
                            callee = stack[-1]
                            if args is EMPTY and type(callee) is Global and id(callee) not in builders:
                                times[id(callee)] += 1
                                stack[-1] = Record(callee, EMPTY, True)
                                continue
                            known = alike.get(id(callee))
                            if known is not None and args is EMPTY and used is not None:
                                found = known.next(data, at, used, count)
                                if found is not None:
                                    stack[-1], at, places = found
                                    count += places
                                    continue
                            stack[-1] = machine.call(callee, args, True)
                            if known is not None:
                                begun.append((stack[-1], known, at))
                        elif code == 0x8C:  # SHORT_BINUNICODE
                            begin = at + 1
                            at = begin + data[at]
                            if at > len(data):
                                raise ShortDataError(at - start - 1)
                            stack.append(data[begin:at].decode("utf-8", "surrogatepass"))
                        elif code == 0x86:  # TUPLE2
                            last = stack.pop()
                            stack[-1] = (stack[-1], last)
                        elif code == 0x89:  # NEWFALSE
                            stack.append(False)
                        elif code == 0x87:  # TUPLE3
                            last = stack.pop()
                            middle = stack.pop()
                            stack[-1] = (stack[-1], middle, last)
                        elif code == 0x88:  # NEWTRUE
                            stack.append(True)
                        else:
                            at, stack = machine.rare(code, at, stack)
                    elif code == 0x68:  # BINGET
                        stack.append(memo[data[at]])
                        at += 1
                    elif code == 0x6A:  # LONG_BINGET
                        stack.append(memo[_u32(data, at)[0]])
                        at += 4
                    elif code == 0x71:  # BINPUT
                        if used is not None:
                            raise KeepAllError
                        memo[data[at]] = stack[-1]
                        at += 1
                    elif code == 0x28:  # MARK
                        marks.append(stack)
                        stack = []
                    elif code == 0x4B:  # BININT1
                        stack.append(data[at])
                        at += 1
                    elif code == 0x29:  # EMPTY_TUPLE
                        stack.append(EMPTY)
                    elif code == 0x62:  # BUILD
                        state = stack.pop()
                        target = stack[-1]
                        if type(target) is Record and target.state is None:
                            target.state = state
                        else:
                            machine.build(target, state)
                            while begun:
                                made, known, begin = begun.pop()
                                if made is target:
                                    known.learn(data, begin, at, made, machine.size)
                                    break
                    elif code == 0x7D:  # EMPTY_DICT
                        stack.append({})
                    elif code == 0x75:  # SETITEMS
                        items = stack
                        stack = marks.pop()
                        target = stack[-1]
                        if type(target) is dict and len(items) & 1 == 0:
                            halves = iter(items)
                            for key in halves:
                                if type(key) is not str:
                                    check_hashable(key)
                                target[key] = next(halves)
                        else:
                            machine.set_items(target, items)
                    elif code == 0x52:  # REDUCE
                        args = stack.pop()
                        callee = stack[-1]
                        if id(callee) == machine.size and type(args) is tuple and len(args) == 1:
                            if type(args[0]) is tuple:
                                times[machine.size] += 1
                                stack[-1] = args[0]
                            else:
                                stack[-1] = machine.call(callee, args, False)
                        else:
                            stack[-1] = machine.call(callee, args, False)
                    elif code == 0x72:  # LONG_BINPUT
                        if used is not None:
                            raise KeepAllError
                        memo[_u32(data, at)[0]] = stack[-1]
                        at += 4
                    elif code == 0x4D:  # BININT2
                        stack.append(_u16(data, at)[0])
                        at += 2
                    elif code == 0x4E:  # NONE
                        stack.append(None)
                    elif code == 0x4A:  # BININT
                        stack.append(_i32(data, at)[0])
                        at += 4
                    elif code == 0x74:  # TUPLE
                        items = stack
                        stack = marks.pop()
                        stack.append(tuple(items))
                    elif code == 0x58:  # BINUNICODE
                        begin = at + 4
                        at = begin + _u32(data, at)[0]
                        if at > len(data):
                            raise ShortDataError(at - start - 1)
                        stack.append(data[begin:at].decode("utf-8", "surrogatepass"))
                    elif code == 0x5D:  # EMPTY_LIST
                        stack.append([])
                    elif code == 0x65:  # APPENDS
                        items = stack
                        stack = marks.pop()
                        machine.append(stack[-1], items)
                    elif code == 0x61:  # APPEND
                        last = stack.pop()
                        machine.append(stack[-1], [last])
                    elif code == 0x73:  # SETITEM
                        last = stack.pop()
                        key = stack.pop()
                        machine.set_items(stack[-1], [key, last])
                    elif code == 0x47:  # BINFLOAT
                        stack.append(_f64(data, at)[0])
                        at += 8
                    elif code == 0x2E:  # STOP
                        # Python and torch return the last object and forget what else is left.
                        return stack.pop(), buffer.base + at
                    else:
                        if used is not None and code in (0x67, 0x70):  # GET, PUT
                            raise KeepAllError
                        at, stack = machine.rare(code, at, stack)
            except (IndexError, struct.error, ShortDataError) as problem:
                buffer.opcode = start
                if not buffer.advance(problem.needed if isinstance(problem, ShortDataError) else None):
                    raise
                data = buffer.data
                start = at = 0
    finally:
        buffer.opcode = start
        for one in alike.values():
            one.count()
