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
_FUNCTIONS: Mapping[str, Callable[[list[Any]], Any]] = {"multiply": math.prod, "sum": sum}
_LONGEST = 10_000
_DEEPEST = 30


def resolve(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A configuration with its interpolations replaced by what they stand for.

    Args:
        config: plain data, as YAML gives it.

    Returns:
        The configuration, and for each dotted key whose value is not known why; its value stays as it was written.
    """
    troubles: dict[str, str] = {}

    def walk(value: Any, at: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item, (*at, str(key))) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, at) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return _text(config, value, at, ())
        except _UnknownError as error:
            troubles[".".join(at)] = str(error)
            return value

    return walk(config, ()), troubles


class _UnknownError(Exception):
    """An interpolation whose value is not known from the configuration alone."""


def _text(config: Mapping[str, Any], text: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
    while (found := _INNERMOST.search(text)) is not None:
        value = _one(config, found[1].strip(), at, under_way)
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


def _one(config: Mapping[str, Any], inner: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
    name, colon, rest = inner.partition(":")
    if colon:
        return _call(name.strip(), rest)
    return _looked_up(config, inner, at, under_way)


def _call(name: str, arguments: str) -> Any:
    function = _FUNCTIONS.get(name)
    if function is None:
        raise _UnknownError(f"it calls {name}, which only the program that registers it can do")
    values = [load_yaml(part.encode(), "an interpolation") for part in arguments.split(",")]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise _UnknownError(f"{name} is given something that is no number: {arguments.strip()}")
    return function(values)


def _looked_up(config: Mapping[str, Any], name: str, at: tuple[str, ...], under_way: tuple[str, ...]) -> Any:
    """The value at a dotted name; leading dots go up from where it is asked for."""
    plain = name.lstrip(".")
    ups = len(name) - len(plain)
    base = at[: len(at) - ups] if ups else ()
    path = (*base, *(part for part in re.split(r"[.\[\]]", plain) if part))
    value: Any = config
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            raise _UnknownError(f"there is no {'.'.join(path)}")
        value = value[part]
    if isinstance(value, str) and "${" in value:
        key = ".".join(path)
        if key in under_way or len(under_way) > _DEEPEST:
            raise _UnknownError(f"{key} stands for itself")
        return _text(config, value, path, (*under_way, key))
    return value
