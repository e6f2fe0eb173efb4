"""Claims: objects by which writers of one output in an object store tell one another that they are at work.

A store has no locks that end with their process.  A claim is created only if there is none, and renewed all the while,
so that whoever finds one can tell whether its writer lives: at once on the same machine, elsewhere by watching it.
No clocks are compared.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from anyckpt.engine.destination import BusyError
from anyckpt.engine.living import lives, this_process
from anyckpt.errors import OutputError
from anyckpt.storage.objects import ConflictError, Objects

RENEWED_EVERY = 10.0
"""Seconds after which a writer says again that it lives."""

WATCHED_FOR = 45.0
"""Seconds without a word after which a writer counts as dead."""

_held: set[str] = set()
"""What this process's writers call themselves."""


class Claim:
    """One writer's claim.

    Args:
        objects: the store.
        key: of the claim.
        output: what to call what is being written.
        about: what is said of the work, for whoever finds the claim.

    Attributes:
        key: of the claim.
    """

    def __init__(self, objects: Objects, key: str, output: str, about: Mapping[str, Any]) -> None:
        self._objects = objects
        self.key = key
        self._output = output
        self._run = uuid.uuid4().hex
        self._about = {**about, "run": self._run, "process": this_process()}
        self._count = 0
        self._tag = ""
        self._lock = threading.Lock()
        self._lost = False
        self._heard = time.monotonic()
        self._ended = threading.Event()

    def take(self) -> None:
        """Take it, from a dead writer if need be, and renew it from now on.

        Raises:
            BusyError: a living writer has it.
            OutputError: the store refuses.
        """
        _held.add(self._run)
        try:
            self._take()
        except BaseException:
            _held.discard(self._run)
            raise
        self._heard = time.monotonic()
        threading.Thread(target=self._renew, name="anyckpt-claim", daemon=True).start()

    def _take(self) -> None:
        try:
            try:
                self._tag = self._objects.put(self.key, self._said(), new=True)
            except ConflictError:
                tag = tag_of_dead(self._objects, self.key)
                if tag is None:
                    raise self.busy() from None
                self._tag = self._objects.put(self.key, self._said(), new=not tag, instead_of=tag)
        except ConflictError:
            raise self.busy() from None

    def busy(self) -> BusyError:
        """What to raise where another writer is at work."""
        return BusyError("is being written by another process", path=self._output, remedy="wait for it to finish")

    def check(self, *, anew: bool = False) -> None:
        """Raise unless the claim is still this writer's, as far as is known.

        Args:
            anew: ask the store.

        Raises:
            OutputError: it is not, or the store refuses.
        """
        if anew or time.monotonic() - self._heard > WATCHED_FOR:
            self._say_again()
        if self._lost:
            raise OutputError(
                "another process has taken over the work, because nothing was heard of this one for a while",
                path=self._output,
                remedy="leave it to the other process",
            )

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        _held.discard(self._run)
        with self._lock:
            if self._tag and not self._lost:
                for _ in range(2):
                    with suppress(OutputError):
                        self._objects.delete([self.key])
                        break
            self._tag = ""

    def _said(self) -> bytes:
        self._count += 1
        return json.dumps({**self._about, "renewed": self._count}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with suppress(OutputError):
                self._say_again()

    def _say_again(self) -> None:
        with self._lock:
            if not self._tag or self._lost or self._ended.is_set():
                return
            try:
                self._tag = self._objects.put(self.key, self._said(), instead_of=self._tag)
                self._heard = time.monotonic()
            except ConflictError:
                self._lost = True


def tag_of_dead(objects: Objects, key: str) -> str | None:
    """The tag of a claim whose writer is dead, empty if the claim is gone; None if its writer lives.

    Of a writer on another machine this is known only after ``WATCHED_FOR`` seconds in which it says nothing.

    Raises:
        OutputError: the store refuses.
    """
    first = objects.read(key)
    if first is None:
        return ""
    lives = _lives_here(first[0])
    if lives is not None:
        return None if lives else first[1]
    end = time.monotonic() + WATCHED_FOR
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCHED_FOR / 10))
        now = objects.read(key)
        if now is None:
            return ""
        if now[0] != first[0]:
            return None
    return first[1]


def is_of_dead_here(objects: Objects, key: str) -> bool:
    """Whether a claim's writer was a process of this machine that has ended; tells at once.

    Raises:
        OutputError: the store refuses.
    """
    found = objects.read(key)
    return found is None or _lives_here(found[0]) is False


def _lives_here(claim: bytes) -> bool | None:
    """Whether a claim's writer lives; None if it is on another machine, or that cannot be told."""
    try:
        said = json.loads(claim)
        run, process = said["run"], said["process"]
        found = lives(process)
        number = process[1]
    except (ValueError, KeyError, TypeError):
        return False
    return run in _held if found and number == os.getpid() else found
