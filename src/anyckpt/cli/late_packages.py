"""Packages that are imported when something of them is first used, rather than where ``import`` stands."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any


def later(name: str) -> None:
    """Let ``import name``, in this process from now on, import nothing before something of the package is used.

    For the command's own process: in others it is not ours to say what an import does.  Unlike with
    ``importlib.util.LazyLoader`` of Python 3.11, several threads may be the first at once.
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    package = module_from_spec(spec)
    del package.__path__  # with it, its modules could be imported without it
    package.__class__ = _Later
    sys.modules[name] = package


class _Later(ModuleType):
    """A package that is executed when something is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        with _executing:
            if type(self) is _Later and "__path__" not in vars(self):
                self._execute()
            elif type(self) is _Later:  # it asks itself
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)

    def _execute(self) -> None:
        spec = vars(self)["__spec__"]
        vars(self)["__path__"] = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            del vars(self)["__path__"]
            raise
        object.__setattr__(self, "__class__", ModuleType)


_executing = RLock()
