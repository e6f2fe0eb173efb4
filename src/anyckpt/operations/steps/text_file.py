"""Text that is written whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.place import scheme_of


def check_text_file(path: str, sources: Sequence[str], *, overwrite: bool) -> None:
    """Raise unless a file may be written, before any work is done.

    Args:
        path: of the file.
        sources: what is read, which it must not be in the place of.
        overwrite: whether a file that is there may be replaced.

    Raises:
        OutputError: it exists, its folder does not, or it is a folder.
        UsageError: it is a source, or not on a disk.
    """
    if (scheme := scheme_of(path)) is not None:
        raise UsageError("cannot be written to: only a disk can", path=path, found=f"{scheme}://")
    if any(os.path.realpath(path) == os.path.realpath(source) for source in sources):
        raise UsageError("source and destination are the same", path=path, remedy="choose another path")
    if os.path.isdir(path):
        raise OutputError("is a directory", path=path, remedy="choose the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise OutputError("already exists", path=path, remedy="choose another path or pass --overwrite")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise OutputError("cannot be written: its folder does not exist", path=path, remedy="make the folder first")


def write_text(path: str, text: str, *, overwrite: bool) -> None:
    """Write a file; a device or pipe is written to as it is.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f".{name}.anyckpt-partial")
    try:
        if os.path.lexists(path):
            if not overwrite:
                raise OutputError("already exists", path=path, remedy="choose another path or pass --overwrite")
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                with open(path, "w", encoding="utf-8") as stream:
                    stream.write(text)
                return
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(partial, path)
        finally:
            if os.path.lexists(partial):
                os.unlink(partial)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error
