"""Docstrings as a decorator completes them, for the API pages: griffe reads the source, where they are not whole."""

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
