"""What no model's configuration can say, whatever spelled it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from anyckpt.errors import MappingError

LARGEST = 1 << 40  # no size in a model is near it; beyond it, arithmetic on a hostile file is the attack
_MOST_LAYERS = 10_000


def impossible(name: str, expected: object, found: object) -> MappingError:
    """The error for a field that no model has so."""
    return MappingError(f"the configuration's {name} is not possible", expected=expected, found=found)


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Raise MappingError unless each of these fields is a size that a model can have, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < LARGEST:
            raise impossible(name, "a positive size", value)


def check_layers(count: int) -> None:
    """Raise MappingError if there are more layers than a model has."""
    if count > _MOST_LAYERS:
        raise MappingError("the configuration has too many layers", expected=f"at most {_MOST_LAYERS}", found=count)


def layers_of(stated: int) -> range:
    """The layers of a model by what its configuration says, which may not have been checked."""
    return range(min(max(0, stated), _MOST_LAYERS))
