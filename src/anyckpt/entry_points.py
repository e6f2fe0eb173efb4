"""What other packages register: values found through entry points, by group."""

from __future__ import annotations

import os
import sys
from typing import Any, TypeVar

from anyckpt.errors import UsageError

Value = TypeVar("Value")


def registered(group: str) -> dict[str, Any]:
    """The entry points of a group by name; what they name is not imported yet."""
    if not _is_mentioned(group):
        return {}
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=group)}


def _is_mentioned(group: str) -> bool:
    """Whether an installed package may have entry points of the group.

    Importing what reads them properly takes longer than opening a checkpoint, and most have none to read.
    """
    wanted = group.encode()
    for folder in sys.path:
        try:
            names = os.listdir(folder or os.curdir)
        except NotADirectoryError:
            return True  # an archive, whose contents only the proper reader sees
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                try:
                    with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                        if wanted in file.read():
                            return True
                except OSError:
                    continue
    return False


def loaded(point: Any, kind: type[Value]) -> Value:
    """What an entry point names.

    Args:
        point: one that ``registered`` found.
        kind: what it should be.

    Raises:
        UsageError: it cannot be imported, or is something else.
    """
    where = f"{point.name!r} of {point.group}, which is {point.value}"
    package = getattr(point.dist, "name", None) or "the package that registers it"
    try:
        value = point.load()
    except Exception as error:  # whatever a module does when it is imported
        raise UsageError(
            f"{where}, cannot be loaded: {type(error).__name__}: {error}", remedy=f"repair or uninstall {package}"
        ) from error
    if not isinstance(value, kind):
        raise UsageError(
            f"{where}, is not what it should be",
            expected=f"a {kind.__name__}",
            found=f"a {type(value).__name__}",
            remedy=f"repair or uninstall {package}",
        )
    return value
