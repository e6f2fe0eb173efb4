"""What a user asks to be put into which module of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError


@dataclass(frozen=True)
class Put:
    """Something to put into a model.

    Attributes:
        module: whose weights are replaced.
        path: of the model that has the others.
    """

    module: str
    path: str


def parse_puts(said: str | Sequence[str] | Mapping[str, str | os.PathLike[str]] | None) -> tuple[Put, ...]:
    """What a user asks to be put where, in its order.

    Raises:
        UsageError: one cannot be understood, or two are for one module.
    """
    if isinstance(said, Mapping):
        pairs = [(module, os.fspath(path)) for module, path in said.items()]
    else:
        texts = [said] if isinstance(said, str) else said or ()
        pairs = [(module, path) for module, _, path in (text.partition("=") for text in texts)]
    for module, path in pairs:
        if not module or not path:
            raise UsageError("--put cannot be understood", expected="MODULE=PATH", found=f"{module}={path}".strip("="))
    found: dict[str, Put] = {}
    for module, path in pairs:
        around = next((name for name in found if f"{module}.".startswith(f"{name}.")), None)
        if around is not None or any(name.startswith(f"{module}.") for name in found):
            raise UsageError(f"--put gives {module} two times", remedy="give each module once")
        found[module] = Put(module, path)
    return tuple(found.values())
