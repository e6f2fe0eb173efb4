"""Namings of the hub's tensors that other packages bring.

A package registers an ``OtherDialect`` as an entry point of the group ``anyckpt.dialects``.  Then ``convert --names``
writes it, a format can name it as its own, and checkpoints that are named so are recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, cached_property

from anyckpt.config.starred import filled, starred
from anyckpt.data_classes import dataclass
from anyckpt.entry_points import loaded, registered
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class OtherDialect:
    """A naming with one tensor for each of the hub's.

    Attributes:
        name: as in ``convert --names`` and ``Format.dialect``.
        names: pairs of a hub pattern and its own; a ``*`` is the index of a layer or expert, the same on both sides.
            A hub name that none fits is kept.
        evidence: own patterns of which every model has a name, and no other naming has: by them it is recognised,
            where no name of a layer or of the embedding is Megatron's.
    """

    name: str
    names: tuple[tuple[str, str], ...]
    evidence: tuple[str, ...]

    def from_hub(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors under its names, from the hub's.

        Raises:
            MappingError: two tensors would have one name.
        """
        return _renamed(tensors, self._spellings)

    def to_hub(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors under the hub's names, from its own.

        Raises:
            MappingError: two tensors would have one name.
        """
        return _renamed(tensors, self._meanings)

    def is_of(self, names: Iterable[str]) -> bool:
        """Whether names are spelled so."""
        known = list(names)
        return bool(self.evidence) and all(
            any(pattern.fullmatch(name) for name in known) for pattern in map(starred, self.evidence)
        )

    @cached_property
    def _spellings(self) -> list[tuple[re.Pattern[str], str]]:
        return [(starred(hub), own) for hub, own in self.names]

    @cached_property
    def _meanings(self) -> list[tuple[re.Pattern[str], str]]:
        return [(starred(own), hub) for hub, own in self.names]


@cache
def other_dialects() -> dict[str, OtherDialect]:
    """Those that packages have registered, by name."""
    found = (loaded(point, OtherDialect) for point in registered("anyckpt.dialects").values())
    return {dialect.name: dialect for dialect in found}


def spelled_as(names: Iterable[str]) -> OtherDialect | None:
    """The registered dialect that names are of, or None."""
    known = list(names)
    return next((dialect for dialect in other_dialects().values() if dialect.is_of(known)), None)


def _renamed(tensors: Mapping[str, LazyTensor], table: list[tuple[re.Pattern[str], str]]) -> dict[str, LazyTensor]:
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match, wanted = next(((m, to) for pattern, to in table if (m := pattern.fullmatch(name))), (None, name))
        key = wanted if match is None else filled(wanted, match.groups())
        if key in result:
            raise MappingError("two tensors would have one name", tensor=name, found=key)
        result[key] = tensor
    return result
