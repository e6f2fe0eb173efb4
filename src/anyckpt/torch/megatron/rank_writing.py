"""One rank's part of a ``torch_dist`` checkpoint: laid out while training waits, written then or by another process.

What is laid out tells where each item will lie before anything is written, so that the index can be made meanwhile.
The process that writes leaves a record beside the files, by which the trainer knows what became of them.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from anyckpt.data_classes import dataclass
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.engine.manifest import ManifestEntry
from anyckpt.errors import OutputError
from anyckpt.indexing import Shape
from anyckpt.operations.steps.live import Live
from anyckpt.torch.live import LiveState
from anyckpt.torch.rank_files import ItemPlace, RankFiles, write_files

_FIELDS = tuple(field.name for field in fields(ManifestEntry))


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that this rank writes.

    Attributes:
        name: the tensor's.
        offset: index of its first element in the whole.
        sizes: elements along each axis.
        whole: the tensor's shape.
    """

    name: str
    offset: Shape
    sizes: Shape
    whole: Shape


@dataclass(frozen=True)
class Layout:
    """What a rank writes; plain data, which another process can be sent.

    Attributes:
        rank: its number.
        objects: unique key and serialized object, each.
        chunks: boxes of tensors, in the order of the tensors that go with them.
    """

    rank: int
    objects: tuple[tuple[str, bytes], ...]
    chunks: tuple[Chunk, ...]


def laid_out(live: LiveState, rank: int) -> tuple[Layout, list[torch.Tensor]]:
    """What a rank writes of its state, and the tensors that it is of: every box of which it has the copy that counts.

    Objects are wrapped in a list, as Megatron-Core does: it keeps all objects of a rank that have one name in it.
    """
    pieces = [piece for piece in live.pieces if not piece.replica]
    objects: dict[str, list[Any]] = {}
    for one in live.objects:
        if not one.replica:
            objects.setdefault(one.name, []).append(one.value)
    chunks = tuple(Chunk(piece.name, piece.offset, piece.sizes, piece.shape) for piece in pieces)
    saved = tuple((name, _saved(values)) for name, values in objects.items())
    return Layout(rank, saved, chunks), [piece.tensor for piece in pieces]


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def files_of(layout: Layout, tensors: Sequence[torch.Tensor]) -> tuple[RankFiles, list[ItemPlace], list[ItemPlace]]:
    """The files, and where the objects and the chunks lie in them.

    Raises:
        UsageError: a tensor has no elements in memory that can be written.
    """
    files, live = RankFiles(layout.rank), Live()
    objects = [files.add_bytes(data) for _, data in layout.objects]
    chunks = []
    for chunk, tensor in zip(layout.chunks, tensors, strict=True):
        lazy = live.tensor(tensor)
        assert lazy is not None
        piece = "" if chunk.sizes == chunk.whole else f"chunk at {list(chunk.offset)}"
        chunks.append(files.add_tensor(chunk.name, lazy, piece))
    return files, objects, chunks


def write_rank(
    layout: Layout,
    tensors: Sequence[torch.Tensor],
    folder: str,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Write a rank's files into a folder, and beside it a record of them or of why they are not there.

    Raises:
        AnyckptError: they could not be written; the record says so, too.
    """
    record = record_path(folder, layout.rank)
    try:
        entries = write_files(files_of(layout, tensors)[0].plan(), folder, workers=workers, memory=memory)
    except BaseException as error:
        _put(record, {"failed": str(error) or type(error).__name__})
        raise
    _put(record, {"entries": [[getattr(entry, name) for name in _FIELDS] for entry in entries]})


def record_path(folder: str, rank: int) -> str:
    """Where a rank's record lies."""
    return os.path.join(os.path.dirname(folder), f"written.{rank}")


def written(folder: str, rank: int) -> tuple[ManifestEntry, ...]:
    """What the manifest says of the files that a rank wrote.

    Raises:
        OutputError: they were not written.
    """
    try:
        with open(record_path(folder, rank), encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        raise OutputError(
            "the process that writes the checkpoint ended before it was done",
            path=folder,
            remedy="look at that process's output; the checkpoint before is untouched",
        ) from None
    if "failed" in record:
        raise OutputError(f"the checkpoint could not be written: {record['failed']}")
    return tuple(ManifestEntry(*entry) for entry in record["entries"])


def _put(path: str, record: dict[str, Any]) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(f"{path}.new", path)
