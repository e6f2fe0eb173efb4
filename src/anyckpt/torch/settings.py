"""A model's configuration in a training process: plain data that is also read by attribute, references resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from anyckpt.errors import UsageError

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_PATH = re.compile(r"(\.*)([A-Za-z_0-9-]+(?:\.[A-Za-z_0-9-]+)*)")
_DEEPEST = 32


class Settings(dict[str, Any]):
    """A configuration: a dictionary whose keys are attributes, too (``cfg.encoder.dim``), at every level.

    A missing key is None as an attribute is in no way: it raises AttributeError, as ``cfg["x"]`` raises KeyError.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__()
        for key, value in {**(values or {}), **more}.items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _wrapped(value))

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As a dictionary's."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *given: Any, **more: Any) -> None:
        """As a dictionary's."""
        for key, value in dict(*given, **more).items():
            self[key] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return Settings(plain(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, (plain(self),)


def _wrapped(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, Settings):
        return Settings(value)
    if isinstance(value, (list, tuple)):
        return [_wrapped(item) for item in value]
    return value


def settings(given: Any) -> Settings:
    """The configuration of a constructor's argument.

    Args:
        given: a mapping, a data class, OmegaConf's ``DictConfig``, or None for an empty one.

    Raises:
        UsageError: it is something else.
    """
    if given is None:
        return Settings()
    if type(given).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        given = OmegaConf.to_container(given, resolve=True, enum_to_str=True)
    elif is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
    if not isinstance(given, Mapping):
        raise UsageError(
            "a configuration cannot be made of this", expected="a mapping or a data class", found=type(given).__name__
        )
    return Settings(given)


def plain(value: Any) -> Any:
    """A copy in dictionaries and lists of its own."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None if there is none."""
    value: Any = config
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def put(config: Mapping[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; sections on the way are made.

    Raises:
        UsageError: something on the way is no section.
    """
    *sections, last = path.split(".")
    at: Any = config
    for key in sections:
        if isinstance(at, list):
            at = at[int(key)] if key.isdigit() and int(key) < len(at) else None
        elif isinstance(at, dict):
            at = at.setdefault(key, {})
    if isinstance(at, list) and last.isdigit() and int(last) < len(at):
        at[int(last)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise UsageError(f"the configuration has no place {path!r}", found=type(at).__name__)


def resolved(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy in which each reference ``${a.b}`` to another key is what stands there, as OmegaConf resolves it.

    Only references to keys of the same configuration are followed, absolute (``${a.b}``) or from their own section
    (``${.b}``, ``${..b}``): what would call something (``${oc.env:HOME}``) is refused.

    Args:
        config: plain data.
        name: what to call it in messages.

    Raises:
        UsageError: a reference leads nowhere or in a circle, or asks for a call.
    """

    def text(value: str, at: tuple[str, ...], depth: int) -> Any:
        whole = _REFERENCE.fullmatch(value)
        if whole is not None:
            return follow(whole[1], at, depth)
        return _REFERENCE.sub(lambda match: str(follow(match[1], at, depth)), value)

    def follow(reference: str, at: tuple[str, ...], depth: int) -> Any:
        match = _PATH.fullmatch(reference.strip())
        where = ".".join(at)
        if match is None or depth > _DEEPEST:
            raise UsageError(
                f"{where} has a reference that is not followed" if match is None else f"{where} refers to itself",
                path=name,
                expected="${key.of.the.same.configuration}",
                found=f"${{{reference}}}"[:80],
                remedy="write the value",
            )
        up, path = len(match[1]), match[2]
        start = at[: len(at) - up] if up else ()
        target = (*start, *path.split("."))
        value = look_up(config, ".".join(target))
        if value is None and not _has(config, target):
            raise UsageError(f"{where} refers to {'.'.join(target)!r}, which is not there", path=name)
        return walk(value, target, depth + 1)

    def walk(value: Any, at: tuple[str, ...], depth: int) -> Any:
        if isinstance(value, str):
            return text(value, at, depth) if "${" in value else value
        if isinstance(value, Mapping):
            return {key: walk(item, (*at, str(key)), depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item, (*at, str(index)), depth) for index, item in enumerate(value)]
        return value

    result: dict[str, Any] = walk(config, (), 0)
    return result


def _has(config: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    section = look_up(config, ".".join(path[:-1])) if path[1:] else config
    return isinstance(section, (Mapping, list)) and (isinstance(section, list) or path[-1] in section)
