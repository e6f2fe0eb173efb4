"""Plain data that a pickle builds by calls: sets, bytes, ordered dictionaries and torch sizes.

Each entry recognises exactly the arguments that Python's own pickler writes.  Any other arguments give
``NotImplemented``, and the reader keeps an inert record: ``bytes(10**12)`` in a hostile file then costs
nothing.  Types whose plain form would lose how to write them back (numpy arrays, omegaconf nodes,
namespaces, paths) stay records here; :mod:`anyckpt.pickling.plain` shows them as plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyckpt.pickling.records import DictRecord, Global, Record, check_hashable

Constructor = Callable[[Global, tuple[Any, ...], bool], Any]
"""(callee, arguments, whether NEWOBJ was used) -> the object, or NotImplemented to keep an inert record."""

_LATIN = ("latin1", "latin-1")


def _size(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) == 1 and type(args[0]) is tuple:
        return args[0]
    if len(args) == 1 and type(args[0]) is list:
        return tuple(args[0])
    return NotImplemented


def _ordered_dict(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if not args:
        return DictRecord(callee, (), new)
    if len(args) != 1 or type(args[0]) is not list or new:
        return NotImplemented
    result = DictRecord(callee)
    for pair in args[0]:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            return NotImplemented
        check_hashable(pair[0])
        result[pair[0]] = pair[1]
    return result


def _counter(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) > 1 or (args and type(args[0]) is not dict):
        return NotImplemented
    result = DictRecord(callee, (), new)
    if args:
        result.update(args[0])
    return result


def _dictionary(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    return DictRecord(callee, args, new)


def _set(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    kind = set if callee.name == "set" else frozenset
    if not args:
        return kind()
    if len(args) != 1 or type(args[0]) not in (list, tuple):
        return NotImplemented
    for member in args[0]:
        check_hashable(member)
    return kind(args[0])


def _bytes(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if not args:
        return b""
    if len(args) == 1 and type(args[0]) is bytes:
        return args[0]
    return NotImplemented


def _bytearray(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    if len(args) == 2 and type(args[0]) is str and args[1] in _LATIN:
        return bytearray(args[0].encode("latin-1"))
    return NotImplemented


def _encode(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) == 2 and type(args[0]) is str and args[1] in _LATIN:
        return args[0].encode("latin-1")
    return NotImplemented


def _complex(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) == 2 and all(type(part) in (float, int) for part in args):
        return complex(*args)
    return NotImplemented


def _range(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) == 3 and all(type(part) is int for part in args) and args[2]:
        return range(*args)
    return NotImplemented


def _slice(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    if len(args) == 3:
        return slice(*args)
    return NotImplemented


def _new_with_keywords(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    """The writer's spelling of NEWOBJ_EX where the protocol has no such opcode."""
    if len(args) == 3 and type(args[1]) is tuple and type(args[2]) is dict:
        return Record(args[0], args[1], True, kwargs=args[2])
    return NotImplemented


def _reconstructor(callee: Global, args: tuple[Any, ...], new: bool) -> Any:
    """Protocols 0 and 1 make a plain instance by this helper; the same as NEWOBJ without arguments."""
    if len(args) == 3 and type(args[0]) is Global and args[1:] == (Global("builtins", "object"), None):
        return Record(args[0], (), True)
    return NotImplemented


CONSTRUCTORS: dict[str, Constructor] = {
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "collections.defaultdict": _dictionary,
    "lightning.fabric.utilities.data.AttributeDict": _dictionary,
    "lightning_fabric.utilities.data.AttributeDict": _dictionary,
    "pytorch_lightning.utilities.parsing.AttributeDict": _dictionary,
    "lightning.pytorch.utilities.parsing.AttributeDict": _dictionary,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "builtins.range": _range,
    "builtins.slice": _slice,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj_ex__": _new_with_keywords,
}
"""Dotted name of the callee -> how to rebuild its result as plain data."""
