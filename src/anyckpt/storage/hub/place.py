"""Repositories of the Hub as places."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import cached_property

from anyckpt.errors import FormatError
from anyckpt.storage.hub import library
from anyckpt.storage.hub.files import HubFile
from anyckpt.storage.hub.paths import parse
from anyckpt.storage.hub.repository import Repository, opened
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tree import Tree

_KEPT_SECONDS = 30.0
"""So long is what a branch means taken to be the same: a command looks at its paths several times as it begins."""


class HubPlace(Tree):
    """The files of a repository at one commit."""

    is_far = True

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository.path.root)
        self.repository = repository

    def listing(self) -> Mapping[str, ByteSource]:
        return self._files

    @cached_property
    def _files(self) -> dict[str, ByteSource]:
        return {name: HubFile(self.repository, name, entry) for name, entry in self.repository.entries.items()}

    def digest(self, path: str) -> tuple[str, str] | None:
        entry = self.repository.entries.get(self.inner(path))
        return None if entry is None or not entry.digest else (entry.algorithm, entry.digest)

    def nothing_at(self, path: str) -> FormatError:
        if self.repository.folder:
            return library.offline(path)
        named = self.repository.path.revision
        return FormatError(
            f"is not in the repository at {named or 'the head of its main branch'}",
            path=path,
            remedy=f"check the name on the page of {self.repository.path.title}",
        )


_recent: dict[tuple[str, str, str], tuple[float, HubPlace]] = {}
_lock = threading.Lock()


def hub_place(path: str) -> HubPlace:
    """The repository that a path is in, at the commit that its revision means now.

    Raises:
        FormatError: there is none, or it may not be read.
        UnreachableError: the Hub does not answer.
        MissingLibraryError: huggingface_hub is not installed.
    """
    named = parse(path)
    key = (library.endpoint(), str(library.is_offline()), named.root)
    with _lock:
        now = time.monotonic()
        for old in [key for key, (since, _) in _recent.items() if now - since > _KEPT_SECONDS]:
            del _recent[old]
        if key not in _recent:
            _recent[key] = now, HubPlace(opened(named))
        return _recent[key][1]


def forget(repository: str) -> None:
    """What is known of a repository is no more: something was written to it."""
    with _lock:
        for key in [key for key, (_, place) in _recent.items() if place.repository.path.repository == repository]:
            del _recent[key]
