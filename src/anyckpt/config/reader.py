"""A framework's configuration as a file says it: looked up by key, and never trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from anyckpt.config.model import FEATURES, Tokens
from anyckpt.config.possible import LARGEST
from anyckpt.errors import MappingError

if TYPE_CHECKING:
    from anyckpt.config.fields import Codec


class Reader:
    """A configuration from a file, looked up with typed and checked methods; every error names the key.

    Args:
        values: the configuration.
        what: what to call it in a message.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self.values = values
        self.what = what

    def fields(
        self,
        table: Iterable[Codec],
        defaults: Mapping[str, Any],
        *,
        complete: bool = True,
        known: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Hub fields from a table.

        Args:
            table: the correspondence, in the order in which it is read.
            defaults: by key, what its absence means in this model's class; stronger than the table's defaults.
            complete: refuse a configuration without a required key; else its field is None.
            known: fields that have been read from another table.

        Raises:
            MappingError: a required key is absent or a value is not of its type.
        """
        found: dict[str, Any] = {}
        for row in table:
            more = row.read(self, defaults, found if known is None else {**known, **found})
            found.update(more)
            if complete and None in more.values():
                self.require((row,), found)
        return found

    def require(self, table: Iterable[Codec], found: Mapping[str, Any]) -> None:
        """Raise MappingError if a required field of the table is not among those found."""
        for row in table:
            key = row.missing(found)
            if key is not None:
                raise MappingError(
                    f"the {self.what} has no {key}", remedy="give a complete configuration with --config"
                )

    def integer(self, key: str) -> int | None:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (type(value) is int and abs(value) < LARGEST):
            return value
        raise self._wrong(key, "a whole number")

    def count(self, key: str) -> int | None:
        """A whole number, of which 0 says nothing."""
        return self.integer(key) or None

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                raise self._wrong(key, "a number") from None
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        raise self._wrong(key, "a finite number")

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false")

    def truth(self, key: str) -> bool | None:
        """Whether a value of any type is true."""
        value = self.values.get(key)
        return None if value is None else bool(value)

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "text")

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        raise self._wrong(key, "a mapping")

    def tokens(self, key: str) -> Tokens:
        value = self.values.get(key)
        several = value if isinstance(value, (list, tuple)) else [value]
        if value is None or all(type(token) is int and abs(token) < LARGEST for token in several):
            return tuple(value) if isinstance(value, (list, tuple)) else value
        raise self._wrong(key, "a token id or several")

    def frequency(self, key: str) -> int | tuple[int, ...] | None:
        value = self.values.get(key)
        if value is None or (type(value) is int and abs(value) < LARGEST):
            return value
        if isinstance(value, (list, tuple)) and all(type(number) is int and number in (0, 1) for number in value):
            return tuple(value)
        raise self._wrong(key, "a whole number, or 0 or 1 for each layer")

    def pair(self, key: str) -> tuple[int, int] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(type(n) is int and abs(n) < LARGEST for n in value)
        ):
            return value[0], value[1]
        raise self._wrong(key, "two whole numbers")

    def features(self) -> dict[str, Any]:
        """What of ``FEATURES`` is on."""
        return {key: self.values[key] for key in FEATURES if self.values.get(key)}

    def _wrong(self, key: str, expected: str) -> MappingError:
        return MappingError(
            f"the {self.what}'s {key} is of the wrong type", expected=expected, found=repr(self.values[key])[:80]
        )
