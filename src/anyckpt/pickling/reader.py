"""Reads pickles of protocols 0 to 5 without importing or calling anything that they name.

Python's pickle machine is reproduced opcode by opcode (the facts: CPython's ``pickletools`` and
``_pickle.c``), except that a name becomes a :class:`~anyckpt.pickling.records.Global` and a call a
:class:`~anyckpt.pickling.records.Record` or, for the few types in :mod:`~anyckpt.pickling.rebuild`, plain
data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from anyckpt.errors import AnyckptError, FormatError, UnsafeError
from anyckpt.pickling import calls
from anyckpt.pickling.alike import Planned
from anyckpt.pickling.buffered import BufferedPickle, ByteReader, ShortDataError
from anyckpt.pickling.interpreter import KeepAllError, execute
from anyckpt.pickling.opcodes import Machine
from anyckpt.pickling.outline import Outline
from anyckpt.pickling.rebuild import Constructor
from anyckpt.pickling.records import Global

_BIG = 1 << 20  # bytes from which a pickle is worth preparations
_OUTLINED = 16 << 20  # bytes of a pickle that cannot be read which are looked at for calls


class _CallerError(Exception):
    """Carries an exception of a caller's function past the handlers meant for a malformed pickle."""


def load(
    data: bytes | memoryview | ByteReader,
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    constructors: Mapping[str, Callable[[tuple[Any, ...]], Any]] | None = None,
    alike: Mapping[str, Planned] | None = None,
    name: str,
) -> Any:
    """The object that the pickle at the start of ``data`` describes, as plain data and inert records.

    Args:
        data: the pickle; bytes after its STOP opcode are ignored.
        persistent_load: gives the object for a persistent id, and may be asked for the same one again;
            without it a persistent id is an error.
        constructors: the caller's own stand-ins, by dotted name: called with the tuple of arguments where the
            pickle calls that name.  What it returns may have ``set_state(state)``; returning
            ``NotImplemented`` keeps the ordinary record.  This is how a reader of a million small objects
            keeps them compact.
        alike: by the same names, how an object that differs from another in numbers and texts is made without its
            parts (see ``pickling.alike``).
        name: the file's name, for messages.

    Raises:
        FormatError: the pickle is truncated or malformed.
        UnsafeError: it uses the extension registry, sets the state of a class, or has a bomb for a key.
    """
    found = load_prefix(data, persistent_load=persistent_load, constructors=constructors, alike=alike, name=name)
    return found[0]


def load_prefix(
    data: bytes | memoryview | ByteReader,
    start: int = 0,
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    constructors: Mapping[str, Callable[[tuple[Any, ...]], Any]] | None = None,
    alike: Mapping[str, Planned] | None = None,
    leave: Callable[[int, int], Any] | None = None,
    name: str,
) -> tuple[Any, int]:
    """As :func:`load`, for a pickle that begins at ``start``; gives the object and the offset after STOP.

    A ``ByteReader`` is read in steps of 256 KiB, so that the pickle at the head of a file of many GB costs
    only its own size.  With ``leave``, runs of 4096 bytes and more are not read: it is called with their offset and
    length, and what it gives (which has ``size`` and ``read``) stands for them.
    """
    buffer = BufferedPickle(data, start, name)
    callers = {path: _guarded_constructor(call) for path, call in (constructors or {}).items()}
    machine = Machine(buffer, _guarded(persistent_load), callers, leave, alike)
    used = _used_entries(buffer.data) if buffer.whole else None
    try:
        try:
            return _run(machine, used)
        except KeepAllError:
            machine = Machine(BufferedPickle(data, start, name), machine.persistent_load, callers, leave)
            return _run(machine, None)
    except AnyckptError:
        _look_further(machine, data, start)
        raise
    except _CallerError as problem:
        _look_further(machine, data, start)
        raise cast(BaseException, problem.__cause__) from None
    finally:
        _record(machine)


def _record(machine: Machine) -> None:
    """Tell who wants to know what the pickle asks for."""
    wanted = calls.current()
    if wanted is None:
        return
    file = machine.buffer.name
    wanted.add(machine.tally.found(machine.names), file)
    if machine.tally.unread:
        wanted.unread.setdefault(file, machine.tally.unread)
    for data in machine.tally.nested:
        wanted.keep(data, file)


def _look_further(machine: Machine, data: bytes | memoryview | ByteReader, start: int) -> None:
    """Note also what a pickle calls behind the place at which it cannot be read: other software may read on."""
    if calls.current() is None:
        return
    if not isinstance(data, (bytes, memoryview)):
        data = data.read(start, max(0, min(_OUTLINED, data.size - start)))
        start = 0
    machine.tally.take(Outline(bytes(data[start : start + _OUTLINED]), machine.global_name).follow())


def _guarded(function: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if function is None:
        return None

    def call(argument: Any) -> Any:
        try:
            return function(argument)
        except AnyckptError:
            raise
        except Exception as problem:
            raise _CallerError from problem

    return call


def _guarded_constructor(function: Callable[[tuple[Any, ...]], Any]) -> Constructor:
    def call(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
        try:
            return function(args)
        except AnyckptError:
            raise
        except Exception as problem:
            raise _CallerError from problem

    return call


def _used_entries(data: bytes) -> bytearray | None:
    """Which memo entries a big protocol-4 pickle may get back: a superset, or None to keep all.

    Picklers memoize everything and get back a fifth of it.  Keeping only entries whose number follows a byte
    that looks like LONG_BINGET saves most of the memory of a million-chunk index.  An operand that looks so
    by chance only keeps one more entry.
    """
    if len(data) < _BIG or data[0] != 0x80 or data[1] < 4:
        return None
    used = np.zeros(data.count(b"\x94") + 1, np.uint8)
    used[:256] = 1
    raw = np.frombuffer(data, np.uint8)
    step = 1 << 22
    for begin in range(0, raw.size - 4, step):
        at = np.flatnonzero(raw[begin : min(begin + step, raw.size - 4)] == 0x6A) + begin
        index = sum((raw[at + 1 + k].astype(np.uint32) << np.uint32(8 * k) for k in range(4)), np.uint32(0))
        used[index[index < used.size]] = 1
    return bytearray(used)


def _run(machine: Machine, used: bytearray | None) -> tuple[Any, int]:
    """Execute the stream; turn every way in which it can be wrong into a typed error with its offset."""
    buffer = machine.buffer
    try:
        return execute(machine, used)
    except FormatError as problem:
        if problem.path is not None:
            raise
        raise _located(buffer, problem) from None
    except (IndexError, struct.error, ShortDataError) as problem:
        left = buffer.size - buffer.base - buffer.opcode
        stopped = buffer.data[buffer.opcode : buffer.opcode + 1] == b"."
        if isinstance(problem, IndexError) and (left > 1 or stopped):
            raise _located(buffer, FormatError("an opcode needs more objects than the stack holds")) from None
        needed = f"{problem.needed} bytes" if isinstance(problem, ShortDataError) else "more bytes"
        truncated = FormatError("the pickle ends before its STOP opcode", expected=needed, found=f"{max(left - 1, 0)}")
        raise _located(buffer, truncated) from None
    except KeyError as problem:
        raise _located(buffer, FormatError(f"memo entry {problem} is read but was never stored")) from None
    except (ValueError, OverflowError, TypeError, AttributeError, RecursionError, MemoryError) as problem:
        raise _located(buffer, FormatError(f"an operand cannot be decoded: {str(problem)[:200]}")) from None


def _located(buffer: BufferedPickle, problem: FormatError) -> FormatError:
    """The same error with the file's name, the offset of the opcode, and what to do."""
    remedy = "the file is damaged or was made by hand; compare it with its source"
    if isinstance(problem, UnsafeError):
        remedy = "do not open this file with other software before finding out where it came from"
    where = f"pickle, byte {buffer.base + buffer.opcode}"
    return problem.told_as(type(problem), f"{where}: {problem.problem}", path=buffer.name, tensor=None, remedy=remedy)
