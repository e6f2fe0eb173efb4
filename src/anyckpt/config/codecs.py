"""Rows of a table that are more than a key for a field as it is, each read one way and written the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anyckpt.config.fields import Codec, OfKey, OneKey
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

Of = Callable[[Mapping[str, Any]], Any]
"""What follows from the hub's fields."""


def _of(value: Any, fields: Mapping[str, Any]) -> Any:
    return value(fields) if callable(value) else value


@dataclass(eq=False, repr=False, match_args=False)
class Implied(Codec):
    """Fields that no key says, because every model of the class has them so.

    Attributes:
        values: by hub field, a value or a function of the fields before.
        refusal: message where a model has others, which the class then cannot say; None where they may be anything.
    """

    values: Mapping[str, Any | Of]
    refusal: str | None = None

    @property
    def hubs(self) -> tuple[str, ...]:
        return tuple(self.values)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        return {hub: _of(value, found) for hub, value in self.values.items()}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        fields = vars(config)
        for hub, value in self.values.items():
            if self.refusal is not None and fields[hub] != _of(value, fields):
                raise MappingError(self.refusal, expected=_of(value, fields), found=fields[hub])
        return {}


def same_as(hub: str) -> Of:
    """As another field is."""
    return lambda fields: fields[hub]


@dataclass(eq=False, repr=False, match_args=False)
class Fixed(Codec):
    """Keys that have one value in every model that can be converted; absent and null are it.

    Attributes:
        values: by key, the value, or a function of the fields before.
        of: what they are of, for the message.
        reader: the type that is asked for first, a method of ``Reader``; None for any.
        written: they are written.
    """

    values: Mapping[str, Any | Of]
    of: str
    reader: str | None = None
    written: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.values)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, value in self.values.items():
            stated = reader.values.get(key) if self.reader is None else getattr(reader, self.reader)(key)
            expected = _of(value, found)
            if stated is not None and stated != expected:
                wanted = ", ".join(map(str, expected)) if isinstance(expected, list) and expected else expected
                raise MappingError(f"{reader.what}'s {key} is not {self.of}", expected=wanted, found=repr(stated)[:80])
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {key: _of(value, vars(config)) for key, value in self.values.items()} if self.written else {}


@dataclass(eq=False, repr=False, match_args=False)
class Written(Codec):
    """Keys that are written and not read, for other keys say what they say.

    Attributes:
        values: by key, the value, or a function of the hub's fields; None is not written.
        hubs: fields that every model of the class has as the hub has them by default, and that these keys say.
        kept: what the source's own ``config.json`` says stays.
    """

    values: Mapping[str, Any | Of]
    hubs: tuple[str, ...] = ()
    kept: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return () if self.kept else tuple(self.values)

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        there = config.extra.get("hf", {}) if self.kept else {}
        said = {key: _of(value, vars(config)) for key, value in self.values.items() if key not in there}
        return {key: value for key, value in said.items() if value is not None}


@dataclass(eq=False, repr=False, match_args=False)
class Present(Codec):
    """A field that is one value where a key says something, and another where it does not.

    Attributes:
        hub: field of ``ModelConfig``.
        key: the framework's key, which another row reads and writes.
        there: the field where the key is there.
        absent: the field where it is absent or null; null is written.
    """

    hub: str
    key: str
    there: Any
    absent: Any

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        return {self.hub: self.absent if reader.values.get(self.key) is None else self.there}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {self.key: None} if getattr(config, self.hub) == self.absent else {}


@dataclass(eq=False, repr=False, match_args=False)
class Words(OfKey):
    """A field, or several, that a key spells in other words; of several words for one value the first is written.

    Attributes:
        hub: field of ``ModelConfig``, or several.
        key: the framework's key.
        words: spelling -> value, or a function of the other fields; of several fields, a value of each.
        default: the spelling that it means that the key is absent, unless the class's defaults say another.
        reader: the type of the spellings, a method of ``Reader``.
        refusal: message where no word says a model's value.
    """

    hub: str | tuple[str, ...]
    key: str
    words: Mapping[Any, Any | Of]
    default: Any
    reader: str = "text"
    refusal: str | None = None

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,) if isinstance(self.hub, str) else self.hub

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        word = getattr(reader, self.reader)(self.key)
        if word is None:
            word = defaults.get(self.key, self.default)
        if word not in self.words:
            raise MappingError(
                f"{reader.what}'s {self.key} is unknown",
                expected=f"one of {', '.join(map(str, self.words))}",
                found=str(word)[:80],
            )
        value = _of(self.words[word], found)
        return {self.hub: value} if isinstance(self.hub, str) else dict(zip(self.hub, value, strict=True))

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        fields = vars(config)
        value = fields[self.hub] if isinstance(self.hub, str) else tuple(fields[hub] for hub in self.hub)
        meant = {word: _of(of, fields) for word, of in self.words.items()}
        for word, values in meant.items():
            if values == value:
                return {self.key: word}
        refusal = self.refusal or f"no {self.key} says the model's {' and '.join(self.hubs)}"
        one = isinstance(self.hub, str)
        expected = " or ".join(map(str, meant.values())) if one else f"{self.key} one of {', '.join(map(str, meant))}"
        raise MappingError(refusal, expected=expected, found=value)


def negated(hub: str, key: str, default: bool) -> Words:
    """A flag that says that a field is not set; ``default`` is the key's."""
    return Words(hub, key, {False: True, True: False}, default, "flag")


@dataclass(eq=False, repr=False, match_args=False)
class Power(OneKey):
    """A field of which a key has a power.

    Attributes:
        hub: field of ``ModelConfig``, a positive number or None.
        key: the framework's key.
        exponent: the key's value is the field's to it.
    """

    hub: str
    key: str
    exponent: float

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        power = reader.number(self.key)
        if power is not None and not 1e-9 < power < 1e9:
            raise MappingError(
                f"the {reader.what}'s {self.key} is not possible", expected="a positive factor", found=power
            )
        return {self.hub: None if power is None else power ** (1 / self.exponent)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        value = getattr(config, self.hub)
        return {self.key: None if value is None else value**self.exponent}


@dataclass(eq=False, repr=False, match_args=False)
class Multiple(OneKey):
    """A field of which a key has a multiple.

    Attributes:
        hub: field of ``ModelConfig``, a whole number.
        key: the framework's key.
        factor: how many times the field it is.
        default: what it means that the key is absent or null.
    """

    hub: str
    key: str
    factor: int
    default: int

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.integer(self.key)
        value = self.default if stated is None else stated
        if value % self.factor:
            wanted = "an even number" if self.factor == 2 else f"a multiple of {self.factor}"
            raise MappingError(f"{reader.what}'s {self.key} is not possible", expected=wanted, found=value)
        return {self.hub: value // self.factor}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {self.key: self.factor * getattr(config, self.hub)}


@dataclass(eq=False, repr=False, match_args=False)
class Times(OneKey):
    """A field that is another one times what a key says.

    Attributes:
        hub: field of ``ModelConfig``, a whole number.
        key: the framework's key, a whole number.
        unit: the other field, one of those before.
        default: what it means that the key is absent or null.
    """

    hub: str
    key: str
    unit: str
    default: int

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.integer(self.key)
        return {self.hub: found[self.unit] * (self.default if stated is None else stated)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        value, unit = getattr(config, self.hub), getattr(config, self.unit)
        if value % unit:
            raise MappingError(
                f"no {self.key} says the model's {self.hub}", expected=f"a multiple of {unit}", found=value
            )
        return {self.key: value // unit}


@dataclass(eq=False, repr=False, match_args=False)
class Noted(Codec):
    """What a user should know of some models that are written.

    Attributes:
        when: whether it is one.
        note: what.
    """

    when: Callable[[ModelConfig], bool]
    note: str

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if self.when(config):
            notes.append(self.note)
        return {}


@dataclass(eq=False, repr=False, match_args=False)
class OfClass(Codec):
    """Fields that the class says which ``architectures`` names.

    Attributes:
        stem: what the names of the classes that are written begin with.
        ends: by the end of a class's name, its fields; a class of another name says nothing of them.
        told_by: fields by which the class to write is chosen: the first that has the model's.
    """

    stem: str
    ends: Mapping[str, Mapping[str, Any]]
    told_by: tuple[str, ...]

    @property
    def hubs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(hub for fields in self.ends.values() for hub in fields))

    keys = ("architectures",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        name = class_of(reader)
        return next((fields for end, fields in self.ends.items() if name.endswith(end)), {})

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        wanted = [bool(getattr(config, hub)) for hub in self.told_by]
        end = next(end for end, has in self.ends.items() if [bool(has.get(hub)) for hub in self.told_by] == wanted)
        return {"architectures": [self.stem + end]}


def class_of(reader: Reader) -> str:
    """The class that a ``config.json`` names, or ""."""
    names = reader.values.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
