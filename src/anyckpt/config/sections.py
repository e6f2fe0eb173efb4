"""Configurations within configurations: rows of a table that read and write a section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from functools import cached_property
from typing import Any

from anyckpt.config.fields import Codec, OfKey, OneKey
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError


@dataclass(eq=False, repr=False, match_args=False)
class Section(OfKey):
    """What a section of a configuration says, by rows of its own.

    Every key of the section is one that its rows know or that says nothing: any other may change what the model
    computes, and is refused.

    Attributes:
        key: under which the section is.
        rows: what its keys say.
        defaults: by key, what its class takes where it says nothing.
        idle: keys that say nothing of what the model computes.
        constants: keys that are written as they are, before the others.
        closed: no other keys are known.
    """

    key: str
    rows: tuple[Codec, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    closed: bool = True

    @cached_property
    def hubs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(hub for row in self.rows for hub in row.hubs))

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = Reader(reader.mapping(self.key), f"{reader.what}'s {self.key}")
        known = {key for row in self.rows for key in row.keys} | self.idle | self.constants.keys()
        for key, value in inner.values.items() if self.closed else ():
            if key not in known and value not in (None, False, 0, "", [], {}):
                raise MappingError(
                    f"the {inner.what} says {key}, which may change what the model computes",
                    expected="keys that this family's models have",
                    found=repr(value)[:80],
                    remedy="convert to safetensors, torch or dcp, which keep names",
                )
        return inner.fields(self.rows, self.defaults, known=found)

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        written = dict(self.constants)
        for row in self.rows:
            written.update(row.write(config, notes))
        return {self.key: written}


@dataclass(eq=False, repr=False, match_args=False)
class Only(OfKey):
    """A key that has one value in every model that can be converted, or one of a few.

    Attributes:
        key: the framework's key.
        value: that is written; or a function of the fields before.
        absent: what it means that the key is absent or null, where that is something else.
        also: whether a value means the same, with the fields before.
        written: it is written.
    """

    key: str
    value: Any
    absent: Any = None
    also: Callable[[Any, Mapping[str, Any]], bool] = field(default=lambda value, fields: False)
    written: bool = True

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.values.get(self.key)
        meant = self.absent if stated is None else stated
        wanted = self.value(found) if callable(self.value) else self.value
        same = type(meant) is type(wanted) or isinstance(meant, float) or isinstance(wanted, float)
        if meant is not None and not (same and meant == wanted) and not self.also(meant, found):
            raise MappingError(
                f"the {reader.what}'s {self.key} is one that transformers' class does not have",
                expected=wanted,
                found=f"{meant!r:.80}" if stated is not None else f"none, which is {meant!r:.60}",
                remedy="convert to safetensors, torch or dcp, which keep names",
            )
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        value = self.value(vars(config)) if callable(self.value) else self.value
        return {self.key: value} if self.written else {}


@dataclass(eq=False, repr=False, match_args=False)
class Sum(OneKey):
    """A field that is what a key says and a constant.

    Attributes:
        hub: field of ``ModelConfig``, a whole number.
        key: the framework's key.
        more: the constant.
    """

    hub: str
    key: str
    more: int

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.integer(self.key)
        return {self.hub: None if stated is None else stated + self.more}

    def missing(self, found: Mapping[str, Any]) -> str | None:
        return self.key if found[self.hub] is None else None

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {self.key: getattr(config, self.hub) - self.more}


@dataclass(eq=False, repr=False, match_args=False)
class Share(OneKey):
    """A field that a key says in parts of another: seconds of samples.

    Attributes:
        hub: field of ``ModelConfig``, a whole number.
        key: the framework's key.
        unit: the other field.
        default: what it means that the key is absent.
    """

    hub: str
    key: str
    unit: str
    default: float

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.number(self.key)
        return {self.hub: int((self.default if stated is None else stated) * (found[self.unit] or 0))}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        whole, unit = getattr(config, self.hub), getattr(config, self.unit)
        share = whole / unit
        if int(share * unit) != whole:  # rounded down where it is read
            share = (whole + 0.5) / unit
        return {self.key: share}
