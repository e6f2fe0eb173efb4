"""A repository at one commit: its files with their sizes and digests, by one question to the Hub, or from the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.storage.folder import check_inside
from anyckpt.storage.hub import library
from anyckpt.storage.hub.paths import MAIN, HubPath

GIT = "git"
"""The digest of a file that is in git itself: SHA-1 of ``blob SIZE``, a zero byte and the contents."""

_MOST_LISTED = 50_000
"""So many files does the Hub list at most in what it says of a repository; of more, its tree has to be asked for."""

_DIGEST = re.compile(r"(?P<sha256>[0-9a-f]{64})|(?P<git>[0-9a-f]{40})")


@dataclass(frozen=True)
class Entry:
    """What is known of a file before it is read.

    Attributes:
        size: bytes.
        algorithm: ``sha256``, which files in LFS have; ``git``; empty if no digest is known.
        digest: hexadecimal.
    """

    size: int
    algorithm: str
    digest: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        path: what was asked for.
        commit: what its revision meant when it was opened.
        entries: by the files' names.
        folder: the snapshot in huggingface_hub's cache that it is read from alone; empty if the Hub is asked.
    """

    path: HubPath
    commit: str
    entries: Mapping[str, Entry] = field(repr=False, default_factory=dict)
    folder: str = ""

    def address(self, inner: str) -> str:
        """Where the Hub answers for a file."""
        hub = library.library()
        found: str = hub.hf_hub_url(self.path.repository, inner, repo_type=self.path.kind, revision=self.commit)
        return found

    def cached(self, inner: str) -> str | None:
        """The file in huggingface_hub's cache, of this commit; None if it is not there."""
        if self.folder:
            return os.path.join(self.folder, *inner.split("/"))
        hub = library.library()
        found = hub.try_to_load_from_cache(self.path.repository, inner, repo_type=self.path.kind, revision=self.commit)
        return found if isinstance(found, str) else None


def opened(path: HubPath) -> Repository:
    """Ask the Hub for a repository; while HF_HUB_OFFLINE is set, look into the cache.

    Raises:
        FormatError: there is none, or it may not be read.
        UnreachableError: the Hub does not answer.
        UnsafeError: it lists a file that would lie outside of it.
        MissingLibraryError: huggingface_hub is not installed.
    """
    hub = library.library()
    if library.is_offline():
        return _from_cache(path)
    api = hub.HfApi(library_name="anyckpt")
    about = library.asked(
        lambda: api.repo_info(
            path.repository,
            revision=path.revision,
            repo_type=path.kind,
            files_metadata=True,
            timeout=library.TIMEOUT,
        ),
        path.root,
    )
    listed = [(item.rfilename, item.size, item.lfs, item.blob_id) for item in about.siblings or ()]
    if len(listed) >= _MOST_LISTED or any(size is None for _, size, _, _ in listed):
        listed = library.asked(lambda: _tree(api, path, about.sha), path.root)
    return Repository(
        path,
        about.sha,
        {check_inside(name, path.root): _entry(size, large, blob) for name, size, large, blob in listed},
    )


def _tree(api: Any, path: HubPath, commit: str) -> list[tuple[str, int, Any, str]]:
    found = api.list_repo_tree(path.repository, recursive=True, revision=commit, repo_type=path.kind)
    return [(item.path, item.size, item.lfs, item.blob_id) for item in found if hasattr(item, "size")]


def _entry(size: int, large: Any, blob: str | None) -> Entry:
    sha256 = None if large is None else large["sha256"]
    return Entry(size, "sha256", sha256) if sha256 else Entry(size, GIT if blob else "", blob or "")


def _from_cache(path: HubPath) -> Repository:
    hub = library.library()
    try:
        folder: str = hub.snapshot_download(
            path.repository,
            repo_type=path.kind,
            revision=path.revision or MAIN,
            local_files_only=True,
            allow_patterns=[],  # of a snapshot with some of the files, these are read
        )
    except library.failures() as error:
        raise library.explained(error, path.root) from None
    entries = {}
    for top, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(top, name)
            digest = _DIGEST.fullmatch(os.path.basename(os.path.realpath(file)))  # blobs are called by their etag
            algorithm = "" if digest is None else "sha256" if digest["sha256"] else GIT
            inner = os.path.relpath(file, folder).replace(os.sep, "/")
            try:
                entries[inner] = Entry(os.stat(file).st_size, algorithm, "" if digest is None else digest[0])
            except OSError as error:
                raise FormatError(f"cannot be opened: {error.strerror}", path=file) from error
    return Repository(path, os.path.basename(folder), entries, folder)
