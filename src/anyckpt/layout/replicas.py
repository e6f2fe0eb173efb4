"""Copies of a tensor that several ranks hold and that must be equal: compared in blocks, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from anyckpt.checkpoint import storage_key
from anyckpt.data_classes import dataclass
from anyckpt.storage.requests import HELD_BYTES
from anyckpt.tensor import LazyTensor, held

_BLOCK = 1 << 20  # bytes of each copy that are compared at a time
SMALL = 64 << 20


@dataclass(frozen=True)
class Replicas:
    """Copies of one global tensor, or of one rank's part of it.

    Attributes:
        name: of the global tensor.
        copies: (who holds it, the copy); the first is the one that is taken.
        tied: the copy of the embedding on the last stage; a difference means that it is no copy.
    """

    name: str
    copies: tuple[tuple[str, LazyTensor], ...]
    tied: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.copies[0][1].nbytes

    def differences(self) -> Iterator[tuple[str, int]]:
        """Holders of copies that differ from the first one, with the number of elements that do.

        Raises:
            FormatError: bytes are missing from a file.
        """
        _, first = self.copies[0]
        key = storage_key(first)
        for holder, other in self.copies[1:]:
            if key is not None and storage_key(other) == key:
                continue
            size = first.dtype.itemsize
            count = 0
            for a, b in zip(first.chunks(_BLOCK), other.chunks(_BLOCK), strict=True):
                unequal = a.view(np.uint8) != b.view(np.uint8)
                if unequal.any():
                    count += int(unequal.reshape(-1, size).any(axis=1).sum())
            if count:
                yield holder, count


def compare(replicas: Iterable[Replicas]) -> list[str]:
    """A warning for each tensor of which copies differ; reads every copy.

    Raises:
        FormatError: bytes are missing from a file.
    """
    warnings = []
    for entry in replicas:
        different = list(entry.differences())
        if different:
            ranks = ", ".join(
                f"{holder} in {count} of {entry.copies[0][1].size} elements" for holder, count in different
            )
            warnings.append(f"{entry.name} differs between ranks: {ranks}; took that of {entry.copies[0][0]}")
    return warnings


def compared(replicas: Iterable[Replicas], compare: Callable[[Replicas], None]) -> None:
    """Call ``compare`` for each entry, with what small far ones hold asked for many at once."""
    for batch in _batches(replicas):
        with held(copy for entry in batch if len(batch) > 1 for _, copy in entry.copies):
            for entry in batch:
                compare(entry)


def _batches(replicas: Iterable[Replicas]) -> Iterator[list[Replicas]]:
    """Entries in their order, as many at a time as are small enough to be held."""
    batch: list[Replicas] = []
    nbytes = 0
    for entry in replicas:
        own = entry.nbytes * len(entry.copies)
        if batch and nbytes + own > HELD_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(entry)
        nbytes += own
    if batch:
        yield batch
