"""What OmegaConf's interpolations stand for: ``${model.hidden_size}``, ``${.width}``, ``${multiply:${a}, 2}``.

Sources: OmegaConf 2.4's grammar; ``multiply`` and ``sum`` are what NeMo registers (nemo/utils/exp_manager.py and the
training scripts of NeMo 1).  Nothing else is called, and the environment is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from anyckpt.plain_yaml import load_yaml

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_INDEX = re.compile(r"[0-9]{1,9}")
_FUNCTIONS: Mapping[str, Callable[[list[Any]], Any]] = {"multiply": math.prod, "sum": sum}
_LONGEST = 10_000
_DEEPEST = 60
_MOST = 100_000


def resolve(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A configuration with its interpolations replaced by what they stand for.

    Args:
        config: plain data, as YAML gives it.

    Returns:
        The configuration, and for each dotted key whose value is not known why; its value stays as it was written.
    """
    troubles: dict[str, str] = {}
    resolver = _Resolver(config)

    def walk(value: Any, at: tuple[str, ...], key: str) -> Any:
        if isinstance(value, Mapping):
            return {
                name: walk(item, (*at, str(name)), f"{key}.{name}" if at else str(name)) for name, item in value.items()
            }
        if isinstance(value, list):
            return [walk(item, (*at, str(index)), key) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return resolver.text(value, at, ())
        except _UnknownError as error:
            troubles[key] = str(error)
            return value

    return walk(config, (), ""), troubles


class _UnknownError(Exception):
    """An interpolation whose value is not known from the configuration alone."""


class _Resolver:
    """Looks values up in one configuration, at most ``_MOST`` in all: a few that double each other have no end."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._left = _MOST

    def text(self, text: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
        """What a string at ``at`` stands for; ``under_way`` are the keys that it is asked for by."""
        while (found := _INNERMOST.search(text)) is not None:
            value = self._one(found[1].strip(), at, under_way)
            if found.start() == 0 and found.end() == len(text):
                return value
            if isinstance(value, (Mapping, list)):
                raise _UnknownError(f"{found[0]} is no plain value")
            text = text[: found.start()] + ("null" if value is None else str(value)) + text[found.end() :]
            if len(text) > _LONGEST:
                raise _UnknownError("what it stands for is too long")
        if "${" in text:
            raise _UnknownError(f"{text} is no interpolation that OmegaConf knows")
        return text

    def _one(self, inner: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
        name, colon, rest = inner.partition(":")
        return _call(name.strip(), rest) if colon else self._looked_up(inner, at, under_way)

    def _looked_up(self, name: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
        """The value at a dotted name; leading dots go up from where it is asked for."""
        plain = name.lstrip(".")
        ups = len(name) - len(plain)
        base = at[: len(at) - ups] if ups else ()
        path = (*base, *(part for part in re.split(r"[.\[\]]", plain) if part))
        value: Any = self._config
        for part in path:
            if isinstance(value, list) and _INDEX.fullmatch(part) and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                raise _UnknownError(f"there is no {'.'.join(path)}")
        return self._within(value, path, under_way)

    def _within(self, value: Any, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
        """A value that stands at ``at``, its own interpolations replaced."""
        self._left -= 1
        if self._left < 0:
            raise _UnknownError("what the interpolations of the file stand for is too much")
        if not isinstance(value, (Mapping, list)) and not (isinstance(value, str) and "${" in value):
            return value
        key = ".".join(at)
        if key in under_way or len(under_way) > _DEEPEST:
            raise _UnknownError(f"{key} stands for itself")
        inside = (*under_way, key)
        if isinstance(value, Mapping):
            return {name: self._within(item, (*at, str(name)), inside) for name, item in value.items()}
        if isinstance(value, list):
            return [self._within(item, (*at, str(index)), inside) for index, item in enumerate(value)]
        return self.text(value, at, inside)


def _call(name: str, arguments: str) -> Any:
    function = _FUNCTIONS.get(name)
    if function is None:
        raise _UnknownError(f"it calls {name}, which only the program that registers it can do")
    values = [load_yaml(part.encode(), "an interpolation") for part in arguments.split(",")]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise _UnknownError(f"{name} is given something that is no number: {arguments.strip()}")
    return function(values)
