"""One file written in the place of an earlier one of its name, and of nothing else."""

from __future__ import annotations

import os

from anyckpt.engine.execute import execute
from anyckpt.engine.plan import Plan
from anyckpt.errors import OutputError


def write_file(plan: Plan, path: str) -> None:
    """Write a plan of one file; what is there is replaced when the new one is whole.

    Raises:
        OutputError: it cannot be written, or a folder is there.
    """
    check_no_folder(path)
    execute(plan, path, overwrite=True)


def check_no_folder(path: str) -> None:
    """Raise OutputError if a folder is where a file is to be: replacing it would remove all that is in it."""
    if os.path.isdir(path):
        raise OutputError("is a folder", path=path, expected="the path of a file", remedy="name the file, too")
