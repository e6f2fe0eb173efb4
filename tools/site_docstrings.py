"""What the API pages need to be told, as griffe reads the source: whole docstrings, and which classes are of data."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe


class Decorated(griffe.Extension):
    """Takes the docstring of a function that ``documented`` decorates from the function itself."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring and any(str(one.value) == "documented" for one in func.decorators):
            made = getattr(import_module(func.parent.path if func.parent else ""), func.name)
            func.docstring.value = inspect.getdoc(made) or func.docstring.value


class DataClasses(griffe.Extension):
    """Takes our ``dataclass`` for the standard library's, whose ``__init__`` griffe knows."""

    def on_alias_instance(self, *, alias: griffe.Alias, **_: Any) -> None:
        if alias.target_path == "anyckpt.data_classes.dataclass":
            alias.target_path = "dataclasses.dataclass"
