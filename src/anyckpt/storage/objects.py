"""What a writer asks of an object store: whole objects, conditional ones, uploads in parts, and a listing.

An object appears whole or not at all, and never changes unless it is replaced.  Whoever writes a checkpoint needs no
more than this (``engine.object_destination``), so that every store is written by the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime

from anyckpt.data_classes import dataclass

PART_BYTES = 6 << 20
"""An upload has parts of at least so many bytes; Amazon's S3 takes none of less than 5 MiB but the last."""

MOST_PARTS = 10_000
"""Amazon's S3 takes no more parts of an object."""


class ConflictError(Exception):
    """An object that was to be new is there, or one that was to be replaced is not as it was."""


@dataclass(frozen=True)
class ObjectFacts:
    """What a listing tells of an object.

    Attributes:
        nbytes: its size.
        tag: changes whenever the object does (its entity tag).
        modified: when it was written, by the store's clock.
    """

    nbytes: int
    tag: str
    modified: datetime


@dataclass(frozen=True)
class UnfinishedUpload:
    """An upload that somebody began and did not finish.

    Attributes:
        key: of the object that it was to be.
        number: what the store calls it.
    """

    key: str
    number: str


class Upload(ABC):
    """An object that goes up in parts and is not there until it is finished."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Add bytes; waits while enough are on their way.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def finish(self, before: str = "") -> str:
        """Let the object appear, in place of one of its name; its tag.

        Args:
            before: the tag of the one of its name that was there when the work began; empty if none was.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Have the store forget the parts, as far as it answers."""


class Objects(ABC):
    """Objects of one store by key.

    Attributes:
        root: what comes before a key in a message, such as ``s3://bucket/``.
        weaker: what this store was found not to be able to do, in sentences for a user.
    """

    root: str
    weaker: tuple[str, ...] = ()

    @abstractmethod
    def listed(self, prefix: str) -> dict[str, ObjectFacts]:
        """Everything in a folder and below it, by key.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def facts(self, key: str) -> ObjectFacts | None:
        """What is known of one object; None if there is none.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small object and its tag; None if there is none.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, new: bool = False, instead_of: str | None = None) -> str:
        """Write a small object at once.

        Args:
            key: its name.
            data: its bytes.
            new: only if there is none.
            instead_of: only if the one that is there has this tag.

        Returns:
            its tag.

        Raises:
            ConflictError: the condition is not met, and what is there are not these bytes.
            OutputError: the store refuses.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error.

        Raises:
            OutputError: the store refuses.
        """

    @abstractmethod
    def upload(self, key: str, nbytes: int, at_once: int) -> Upload:
        """Begin an object of ``nbytes`` bytes, of which ``at_once`` parts are on their way at a time."""

    @abstractmethod
    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """Uploads of the object of a key and of those below it that are not finished, as far as they are seen."""

    @abstractmethod
    def forget(self, upload: UnfinishedUpload) -> None:
        """Have the store forget an upload that it told of.

        Raises:
            OutputError: the store refuses.
        """

    def name_of(self, key: str) -> str:
        """What to call an object in a message."""
        return self.root + key


def part_bytes(nbytes: int) -> int:
    """Bytes of each part of an upload.

    All parts are alike but the last, which is shorter than the number of parts: an upload that waits to be finished
    then keeps next to nothing in memory.
    """
    count = max(1, min(nbytes // PART_BYTES, MOST_PARTS - 1))
    return max(1, nbytes // count)
