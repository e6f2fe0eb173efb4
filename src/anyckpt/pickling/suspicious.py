"""Which calls in a pickle no checkpoint needs: what a user should know before other software obeys the file."""

from __future__ import annotations

from typing import Any

from anyckpt.pickling.records import Record
from anyckpt.pickling.walk import find_leaves

_MODULES = frozenset({
    "asyncio", "bdb", "code", "codeop", "commands", "ctypes", "distutils", "doctest", "ftplib", "http", "httplib",
    "imp", "importlib", "marshal", "nt", "os", "pdb", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "pip",
    "platform", "posix", "profile", "pty", "pydoc", "requests", "runpy", "shelve", "shutil", "signal", "smtplib",
    "socket", "_socket", "ssl", "subprocess", "_posixsubprocess", "sys", "telnetlib", "tempfile", "threading",
    "timeit", "trace", "urllib", "urllib2", "venv", "webbrowser", "zipimport",
})  # fmt: skip
"""Modules, with all below them, whose functions run programs, load code, or reach files and the network."""

_REACHED = frozenset({"builtins", "importlib", "os", "pickle", "posix", "shutil", "socket", "subprocess", "sys"})
"""Of these, what ordinary modules import, so that a dotted name reaches it through them: ``torch.os.system``."""

_HARMLESS_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object",
    "range", "set", "slice", "str", "tuple", "type",
})  # fmt: skip
_FUNCTIONS = frozenset({
    "joblib.load", "numpy.load", "numpy.testing._private.utils.runstring", "torch.hub.load", "torch.load",
    "torch.serialization.load", "types.CodeType", "types.FunctionType",
})  # fmt: skip
_CLASSES = frozenset({"signal.Signals", "threading.Lock"})


def suspicious_calls(root: Any) -> list[str]:
    """Dotted names of functions that run code, or reach files and the network, each once, in order.

    Args:
        root: what ``pickling.load`` gives; its records describe calls that nobody has made.
    """
    found: dict[str, None] = {}

    def look(value: Any) -> bool:
        while isinstance(value, Record):
            if _is_suspicious(value.path):
                found[value.path] = None
            value = value.type
        return False

    list(find_leaves(root, look))
    return list(found)


def _is_suspicious(name: str) -> bool:
    module, _, function = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return function not in _HARMLESS_BUILTINS
    parts = name.split(".")[:-1]
    known = name in _FUNCTIONS or (bool(parts) and parts[0] in _MODULES)
    return (known or not _REACHED.isdisjoint(parts)) and name not in _CLASSES
