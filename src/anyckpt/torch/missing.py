"""What is said where a library is not installed that an extra brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyckpt.errors import MissingLibraryError

_LIBRARIES = ("torch", "lightning", "megatron")


def told_of(find: Callable[[str], Any], package: str, extra: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that names the extra where a library is missing.

    Args:
        find: the one without.
        package: whose it is.
        extra: what brings the libraries that its names need.
    """

    def found(name: str) -> Any:
        try:
            return find(name)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in _LIBRARIES:
                raise
            raise MissingLibraryError(
                f"{package}.{name} needs {library}, which is not installed", remedy=f"pip install anyckpt[{extra}]"
            ) from error

    return found
