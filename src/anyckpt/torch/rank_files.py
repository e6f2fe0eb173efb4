"""The ``.distcp`` files that one rank writes for itself, through the engine: laid out, then written and made durable.

Where a framework plans a save, each rank learns only what it has to write, so that there is no plan of the whole: each
rank's files are a plan of their own.  All lengths are known when the last item was added, before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from anyckpt.containers.torch_file import shift_parts, tensor_zip_parts
from anyckpt.containers.torch_file.writer import LARGE, PAGE
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.engine.blocks import cut_all
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.engine.files import Bytes, sync_directory, write_error
from anyckpt.engine.manifest import ManifestEntry
from anyckpt.engine.outputs import OutputFiles
from anyckpt.engine.plan import Literal, OutputFile, Part, Plan, TensorData
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.engine.run import Run, of_files, worker_count
from anyckpt.indexing import Shape
from anyckpt.tensor import Constant, LazyTensor

_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class ItemPlace:
    """Where an item was put.

    Attributes:
        file: name of the file.
        offset: first byte of the item in it.
        length: bytes of the item.
    """

    file: str
    offset: int
    length: int


class RankFiles:
    """Files of one rank, to which items are added one after another; each is a whole archive of ``torch.save``.

    The elements of big tensors begin at multiples of 4096 bytes, so that they are written past the page cache.

    Args:
        number: the rank's number, for the names of the files.
        file_bytes: a file that has so many bytes is followed by another.
    """

    def __init__(self, number: int, *, file_bytes: int = _FILE_BYTES) -> None:
        self._number = number
        self._file_bytes = file_bytes
        self._names: list[str] = []
        self._parts: list[list[Part]] = []
        self._nbytes = 0
        self._archives: dict[tuple[DType, Shape, int], tuple[Part, ...]] = {}

    def add_tensor(self, name: str, tensor: LazyTensor, piece: str = "") -> ItemPlace:
        """Put a tensor into the newest file.

        Args:
            name: the tensor's, for messages and the manifest.
            tensor: its elements, or those of a chunk of it.
            piece: which chunk it is; empty for the whole.
        """
        self._open(tensor.nbytes)
        # Archives of equal tensors differ only in the padding of large ones, and that by where in a page they begin.
        kind = (tensor.dtype, tensor.shape, self._nbytes % PAGE if tensor.nbytes >= LARGE else 0)
        parts = self._archives.get(kind)
        if parts is None:
            stand_in = Constant(tensor.dtype, tensor.shape)
            parts = self._archives[kind] = tensor_zip_parts(name, stand_in, file_offset=self._nbytes)
        return self._add([TensorData(name, tensor, piece) if isinstance(part, TensorData) else part for part in parts])

    def add_bytes(self, data: bytes) -> ItemPlace:
        """Put an item into the newest file whose bytes are there: an object that was serialized."""
        self._open(len(data))
        return self._add([Literal(data)])

    def _open(self, nbytes: int) -> None:
        if not self._names or (self._nbytes and self._nbytes + nbytes > self._file_bytes):
            self._names.append(f"__{self._number}_{len(self._names)}.distcp")
            self._parts.append([])
            self._nbytes = 0

    def _add(self, parts: Sequence[Part]) -> ItemPlace:
        place = ItemPlace(self._names[-1], self._nbytes, sum(part.nbytes for part in parts))
        self._parts[-1] += shift_parts(parts, len(self._parts[-1]))
        self._nbytes += place.length
        return place

    def plan(self) -> Plan:
        """The files as a plan of the engine."""
        files = (OutputFile(name, tuple(parts)) for name, parts in zip(self._names, self._parts, strict=True))
        return Plan("dcp", tuple(files))


def write_files(
    plan: Plan, folder: str, *, workers: int | None = None, memory: int = DEFAULT_MEMORY
) -> list[ManifestEntry]:
    """Write a rank's files into a folder that other ranks write to as well, and make them durable.

    Args:
        plan: the files; their names are this rank's alone.
        folder: made if it is not there.
        workers: threads; as many as processors, up to 8, if None.
        memory: bytes for blocks in flight.

    Returns:
        What the manifest says of them.

    Raises:
        OutputError: the system refuses; the files are removed.
        UsageError: ``memory`` is too small for one thread.
    """
    place, cut, numbers = _Folder(folder, plan), cut_all(plan.files), range(len(plan.files))
    threads = worker_count(workers, memory, plan)
    run = Run(plan, cut, place, {}, workers=threads, memory=memory, progress=None, total=plan.nbytes)
    try:
        run.write(of_files(cut, numbers))
        entries = run.finish(numbers)
        if numbers:
            sync_directory(folder)
    except OSError as error:
        place.discard()
        raise write_error(folder, error) from error
    except BaseException:
        place.discard()
        raise
    return entries


class _Folder(Destination):
    """A folder into which each of several processes writes files of its own; who publishes it comes later."""

    page = PAGE

    def __init__(self, folder: str, plan: Plan) -> None:
        self.name = folder
        self._plan = plan
        self._files = OutputFiles(plan, folder, keep=frozenset())

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        """Nothing: files are made when they are written to."""

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        return {}

    def write(self, file: int, offset: int, data: Bytes) -> None:
        self._files.write(file, offset, data)

    def sync(self, files: Collection[int]) -> None:
        self._files.sync(files)

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        """Nothing: what is not whole is written anew."""

    def seal(self, files: Collection[int]) -> None:
        self._files.make(files)
        self._files.sync(files)
        self._files.close(files)

    def publish(self, manifest: bytes) -> None:
        """Nothing: the folder is published when all processes are done."""

    def is_published(self, fingerprint: str) -> bool:
        return False

    def close(self, failure: str = "") -> None:
        self._files.close_all()

    def discard(self) -> None:
        self._files.close_all()
        for file in self._plan.files:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self.name, file.path))
