"""What checks look at: the bytes that are read from files, files that stay open, and what tensors are."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from anyckpt.storage.local_file import LocalFile, forget_open_file
from anyckpt.tensor import LazyTensor

Reads = list[tuple[str, int, int]]
"""File, first byte and byte past the last of each read, in order."""


def require(condition: object, problem: str) -> None:
    """Raise AssertionError with the problem unless the condition holds, also where Python leaves assertions out."""
    if not condition:
        raise AssertionError(problem)


@contextmanager
def observed_reads() -> Iterator[Reads]:
    """What is read from local files meanwhile."""
    reads: Reads = []
    original = LocalFile._read_into

    def recorded(self: LocalFile, offset: int, buffer: memoryview) -> None:
        reads.append((str(self.path), offset, offset + len(buffer)))
        original(self, offset, buffer)

    LocalFile._read_into = recorded  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        LocalFile._read_into = original  # type: ignore[method-assign]


def elements_read(reads: Reads, tensors: Iterable[LazyTensor]) -> int:
    """How many bytes of tensors' elements are among what was read."""
    places = []
    for tensor in tensors:
        for piece in tensor.pieces():
            path, start = piece.source.locate()
            if path is not None:
                places.append((path, start + piece.offset, start + piece.offset + piece.stored_bytes()))
    total = 0
    for path, first, last in reads:
        total += sum(max(0, min(last, end) - max(first, begin)) for held, begin, end in places if held == path)
    return total


def facts(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Element types, shapes and digests of the little-endian elements in C order, by name."""
    return {name: (tensor.dtype.name, tensor.shape, digest(tensor)) for name, tensor in tensors.items()}


def digest(tensor: LazyTensor) -> str:
    """SHA-256 of the elements in C order, read in small steps."""
    found = hashlib.sha256()
    for chunk in tensor.chunks(1 << 16):
        found.update(chunk.tobytes())
    return found.hexdigest()


def files_under(path: str) -> list[str]:
    """The files at a path, links left aside."""
    if not os.path.isdir(path):
        return [path]
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sorted(file for file in found if not os.path.islink(file))


def left_open(path: str) -> list[str]:
    """Which of the files at a path this process holds open, besides the descriptors that anyckpt keeps for reading.

    Only Linux tells; elsewhere none.
    """
    inside = {os.path.realpath(file) for file in files_under(path)}
    for file in inside:
        forget_open_file(file)
    gc.collect()
    if not os.path.isdir("/proc/self/fd"):
        return []
    open_now = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            open_now.add(os.path.realpath(os.readlink(f"/proc/self/fd/{descriptor}")))
        except OSError:
            continue
    return sorted(inside & open_now)
