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
        texts = [f"{module}={os.fspath(path)}" for module, path in said.items()]
    else:
        texts = [said] if isinstance(said, str) else list(said or ())
    found: dict[str, Put] = {}
    for text in texts:
        module, _, path = text.partition("=")
        if not module or not path:
            raise UsageError("--put cannot be understood", expected="MODULE=PATH", found=text or "nothing")
        if module in found:
            raise UsageError(f"--put gives {module} two times", remedy="give each module once")
        for name in found:
            inner, outer = sorted((module, name), key=len, reverse=True)
            if inner.startswith(f"{outer}."):
                raise UsageError(
                    f"--put gives {inner} with {outer} and alone",
                    remedy="put one of both in; the other goes into what comes of it",
                )
        found[module] = Put(module, path)
    return tuple(found.values())
