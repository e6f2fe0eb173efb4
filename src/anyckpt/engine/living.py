"""Which process wrote a note, and whether it still lives, where no lock can tell."""

from __future__ import annotations

import json
import os
from typing import Any

_MOST = 4096


def this_process() -> list[Any]:
    """What tells this process from all others that are and were on its machine, and the machine from all others."""
    return [_machine(), os.getpid(), _begun(os.getpid())]


def lives(process: Any) -> bool | None:
    """Whether another process lives; None if it is on another machine, or that cannot be told.

    Args:
        process: what ``this_process`` gave there.

    Raises:
        ValueError, TypeError: it is something else.
    """
    machine, number, begun = process
    if not machine or machine != _machine() or not isinstance(number, int):
        return None
    return bool(_begun(number) == begun)


def sign(descriptor: int) -> None:
    """Say in a file that this process has what it stands for, unless a living process of this machine does.

    Raises:
        BlockingIOError: it does.
        OSError: the system refuses.
    """
    if is_signed_by_another(descriptor):
        raise BlockingIOError
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)


def is_signed_by_another(descriptor: int) -> bool:
    """Whether another process of this machine that lives has signed a file."""
    try:
        process = json.loads(os.pread(descriptor, _MOST, 0))
        return process != this_process() and lives(process) is True
    except (ValueError, TypeError):
        return False


def _machine() -> str:
    """This machine since it was started, and the process numbers that are seen in it; empty if that is not told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _begun(number: int) -> str:
    """When a process began, in ticks of its machine; empty if there is none."""
    try:
        with open(f"/proc/{number}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
