"""The place of a path in an object store or on a web server."""

from __future__ import annotations

from anyckpt.storage.place import Place
from anyckpt.storage.remote.addresses import WEB, address_of
from anyckpt.storage.remote.bucket import BucketPlace
from anyckpt.storage.remote.web import WebPlace


def place_at(path: str) -> Place:
    """The place of a path.

    Raises:
        MissingLibraryError: obstore is not installed.
        UsageError: the path names no bucket or server, or the settings of its store contradict each other.
    """
    return WebPlace(path) if address_of(path).kind == WEB else BucketPlace(path)
