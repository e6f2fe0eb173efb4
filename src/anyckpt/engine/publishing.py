"""Giving an output its name in one step, where the file system can, and in the next best way where it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil

_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100


def put_new(new: str, destination: str) -> bool:
    """Give a file or directory a name that nothing has.

    Args:
        new: what gets the name.
        destination: the name.

    Returns:
        Whether one that appeared at the same moment would have been noticed, as renaming, linking, and directories do.

    Raises:
        FileExistsError: something has the name.
        OSError: the system refuses.
    """
    if _renamed(new, destination, _NOREPLACE):
        return True
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), destination)
    if os.path.isdir(new):
        os.rename(new, destination)  # takes no name from a directory that holds anything, nor from a file
        return True
    try:
        os.link(new, destination)
    except FileExistsError:
        raise
    except OSError:
        os.rename(new, destination)
        return False
    os.unlink(new)
    return True


def put_in_place(new: str, destination: str, aside: str) -> bool:
    """Give a file or directory the name of one that is there, in one step where the system can.

    Args:
        new: what gets the name.
        destination: the name.
        aside: where a directory that had it goes, if not to ``new``; the caller removes both.  It is put back where
            the name can't be given.

    Returns:
        Whether at every moment one of both had the name.

    Raises:
        OSError: the system refuses.
    """
    if not os.path.isdir(new) and not os.path.isdir(destination):
        os.replace(new, destination)
        return True
    if _renamed(new, destination, _EXCHANGE):
        return True
    try:
        os.rename(destination, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(destination)  # of a lower layer of an overlay, which renames no such directory
    try:
        os.rename(new, destination)
    except OSError:
        if os.path.lexists(aside):
            os.rename(aside, destination)
        raise
    return False


def _renamed(first: str, second: str, how: int) -> bool:
    """Rename, or swap two names, in one step; False where the system or the file system cannot.

    Raises:
        FileExistsError: what must not be there is.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), how) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), second)
    return False
