"""Laying out a distributed checkpoint: ``.distcp`` files and their ``.metadata``, all known when planning.

Every item is a whole ``torch.save`` archive.  The elements of big chunks begin at multiples of 4096 bytes in their
file, by padding that torch's reader skips, so that they can be written past the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

from anyckpt.containers.dcp.chunks import Held, HeldBox, cut, stacked_axes
from anyckpt.containers.torch_file import shift_parts, tensor_zip_parts, zip_parts
from anyckpt.containers.torch_file.writer import LARGE, PAGE
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.engine.plan import OutputFile, Part, TensorData, small_file
from anyckpt.indexing import Shape
from anyckpt.pickling import Filled, Global, Record, Template, dumps
from anyckpt.pickling.torch_objects import SIZE, dtype_global
from anyckpt.tensor import Constant, LazyTensor
from anyckpt.tensor.nodes import Mosaic

_METADATA = "torch.distributed.checkpoint.metadata"
_FILE_BYTES = 4 << 30
_CHUNK_BYTES = 256 << 20  # a loader reads whole chunks to take its slice of them
_VERSION = "1.0.0"  # torch 2.13 torch/distributed/checkpoint/filesystem.py CURRENT_DCP_VERSION


@dataclass
class _File:
    """A ``.distcp`` file being laid out."""

    name: str
    parts: list[Part] = field(default_factory=list)
    nbytes: int = 0

    def add(self, parts: Sequence[Part]) -> int:
        """Append an item; gives its length."""
        length = sum(part.nbytes for part in parts)
        self.parts += shift_parts(parts, len(self.parts))
        self.nbytes += length
        return length


@dataclass(frozen=True)
class _Item:
    """A chunk and where it was put."""

    offsets: Shape
    sizes: Shape
    file: str
    offset: int
    length: int


def dcp_files(
    tensors: Mapping[str, LazyTensor],
    objects: Mapping[str, Any],
    *,
    prefix: str = "",
    ranks: int = 1,
    megatron: bool = False,
    paths: Mapping[str, tuple[str | int, ...]] | None = None,
    file_bytes: int | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
    held: Held | None = None,
) -> list[OutputFile]:
    """The files of a distributed checkpoint.

    Loads in torch >= 2.4 (``torch.distributed.checkpoint.load``) and, with ``metadata.json`` and ``common.pt``
    beside it, in Megatron-Core.  ``.metadata`` has stage 1, everything else stage 0.

    Args:
        tensors: by name.
        objects: everything else by name; plain data and inert records, tensors in them lazy.
        prefix: directory inside the output, without a slash at its end; empty for the output itself.
        ranks: over how many ranks' files (``__{rank}_{n}.distcp``) the bytes are spread evenly.
        megatron: write as Megatron-Core does: a chunk per layer (and expert) of stacked tensors, objects in a list
            of one, no key paths.
        paths: name -> keys from the root of the nested state; a name that is missing is at the root.
        file_bytes: a rank's bytes are divided into files of about this size; 4 GiB if None.
        chunk_bytes: the largest chunk; a longer one is cut along its first axis.
        held: what each of the processes that write together has: each box is a chunk in a file of its process, and
            ``ranks`` does not matter.

    Raises:
        UsageError: an object cannot be pickled.
    """
    layout = _Layout(ranks, file_bytes or _FILE_BYTES, sum(tensor.nbytes for tensor in tensors.values()))
    object_items = {name: layout.add_object(name, value, megatron) for name, value in objects.items()}
    tensor_items = {}
    for name, tensor in tensors.items():
        boxes = (
            _spread(name, tensor, megatron, chunk_bytes) if held is None else _as_held(tensor, held[name], chunk_bytes)
        )
        find = _finder(tensor)
        tensor_items[name] = [layout.add_chunk(name, tensor, box, find) for box in boxes]
    keys = None if megatron else {name: (paths or {}).get(name, (name,)) for name in (*objects, *tensors)}
    index = _metadata(tensors, tensor_items, object_items, keys, numbered=not megatron)
    folder = f"{prefix}/" if prefix else ""
    return [
        *(OutputFile(folder + file.name, tuple(file.parts)) for file in layout.files),
        small_file(f"{folder}.metadata", dumps(index, protocol=4, name=".metadata"), stage=1),
    ]


def _spread(name: str, tensor: LazyTensor, megatron: bool, limit: int) -> Iterator[HeldBox]:
    """The chunks of a tensor of which no process has more than another."""
    stacked = stacked_axes(name) if megatron else 0
    for start, shape in cut(tensor.shape, tensor.dtype.itemsize, stacked=stacked, limit=limit):
        yield HeldBox(start, shape, -1)


def _as_held(tensor: LazyTensor, boxes: Sequence[HeldBox], limit: int) -> Iterator[HeldBox]:
    """The chunks of a tensor of which processes have boxes; a large box is several."""
    for box in boxes:
        for start, shape in cut(box.shape, tensor.dtype.itemsize, limit=limit):
            yield HeldBox(tuple(a + b for a, b in zip(box.start, start, strict=True)), shape, box.rank)


_Find = Callable[[Shape, Shape], LazyTensor]


def _finder(tensor: LazyTensor) -> _Find:
    """Gives boxes of a tensor; those that are its tiles without a search, which takes longer the more there are."""
    if not isinstance(tensor, Mosaic):
        return tensor.box
    tiles = {
        (tuple(start), tuple(b - a for a, b in zip(start, stop, strict=True))): number
        for number, (start, stop) in enumerate(zip(tensor.starts.tolist(), tensor.stops.tolist(), strict=True))
    }

    def find(start: Shape, shape: Shape) -> LazyTensor:
        number = tiles.get((start, shape))
        return tensor.box(start, shape) if number is None else tensor.tiles[number]

    return find


class _Layout:
    """Puts items into files one after another, in the order in which they come."""

    def __init__(self, ranks: int, file_bytes: int, total: int) -> None:
        self.files: list[_File] = []
        self._rank_bytes = -(-total // max(1, ranks))
        self._file_bytes = file_bytes
        self._ranks = max(1, ranks)
        self._done = 0
        self._archives: dict[tuple[DType, Shape, int], tuple[Part, ...]] = {}
        self._nothing: tuple[Part, ...] = ()
        self._open: dict[int, tuple[_File, int]] = {}  # the file that each rank's items go into, and its number

    def add_object(self, name: str, value: object, listed: bool) -> _Item:
        file = self._file(0, 0)
        offset = file.nbytes
        if value is not None:
            parts = self._archive_of(name, [value] if listed else value, offset)
        else:  # a model of experts has an object for each, all None: one archive serves all, wherever it lies
            self._nothing = self._nothing or self._archive_of(name, [None] if listed else None, offset)
            parts = self._nothing
        return _Item((), (), file.name, offset, file.add(parts))

    def _archive_of(self, name: str, value: object, offset: int) -> tuple[Part, ...]:
        return zip_parts(value, file_offset=offset, tensor_name=lambda path: ".".join([name, *map(str, path)]))

    def add_chunk(self, name: str, tensor: LazyTensor, chunk: HeldBox, find: _Find) -> _Item:
        start, shape = chunk.start, chunk.shape
        box = find(start, shape)
        file = self._file(box.nbytes, chunk.rank)
        offset = file.nbytes
        # Archives of equal tensors differ only in the padding of large ones, and that by where in a page they begin.
        kind = (box.dtype, shape, offset % PAGE if box.nbytes >= LARGE else 0)
        parts = self._archives.get(kind)
        if parts is None:
            stand_in = Constant(box.dtype, shape)
            parts = self._archives[kind] = tensor_zip_parts(name, stand_in, file_offset=offset)
        piece = "" if shape == tensor.shape else f"chunk at {list(start)}"
        own = [TensorData(name, box, piece) if isinstance(part, TensorData) else part for part in parts]
        return _Item(start, shape, file.name, offset, file.add(own))

    def _file(self, nbytes: int, rank: int) -> _File:
        """The file for the next item, of ``nbytes`` tensor bytes; of the rank whose turn it is if that is -1."""
        if rank < 0:
            rank = min(self._ranks - 1, self._done // self._rank_bytes if self._rank_bytes else 0)
        file, number = self._open.get(rank, (None, -1))
        if file is None or (file.nbytes and file.nbytes + nbytes > self._file_bytes):
            file = _File(f"__{rank}_{number + 1}.distcp")
            self._open[rank] = (file, number + 1)
            self.files.append(file)
        self._done += nbytes
        return file


def _metadata(
    tensors: Mapping[str, LazyTensor],
    tensor_items: Mapping[str, list[_Item]],
    object_items: Mapping[str, _Item],
    paths: Mapping[str, tuple[str | int, ...]] | None,
    *,
    numbered: bool,
) -> Record:
    """The index, as torch 2.13 pickles it."""
    state = {name: Filled(_BYTES) for name in object_items}
    storage = {Filled(_OBJECT_KEY, name): _place(item) for name, item in object_items.items()}
    properties: dict[DType, Filled] = {}
    for name, items in tensor_items.items():
        dtype, shape = tensors[name].dtype, tensors[name].shape
        if dtype not in properties:
            properties[dtype] = Filled(Template(partial(_properties, dtype)))
        chunks = [Filled(_CHUNK, item.offsets, item.sizes) for item in items]
        state[name] = Filled(_TENSOR, properties[dtype], shape, chunks)
        for number, item in enumerate(items):
            storage[Filled(_KEY, name, number if numbered else None, item.offsets)] = _place(item)
    meta: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    return _record(
        "Metadata",
        {
            "state_dict_metadata": state,
            "planner_data": None if paths is None else dict(paths),
            "storage_data": storage,
            "storage_meta": _record("StorageMeta", meta),
            "version": _VERSION,
        },
    )


def _record(name: str, fields: dict[str, Any]) -> Record:
    return Record(_CLASSES[name], (), True, state=fields)


def _properties(dtype: DType) -> Record:
    layout = Record(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Record(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    return Record(
        Global(_METADATA, "TensorProperties"), (), True, state=(dtype_global(dtype), layout, False, contiguous, False)
    )


def _place(item: _Item) -> Filled:
    return Filled(_PLACE, item.file, item.offset, item.length)


_CLASSES = {
    name: Global(_METADATA, name)
    for name in ("ChunkStorageMetadata", "TensorStorageMetadata", "Metadata", "StorageMeta", "MetadataIndex")
}
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


# What the index has for every tensor, chunk and object.
_BYTES = Template(lambda: Record(Global(_METADATA, "BytesStorageMetadata"), (), True))
_TENSOR = Template(
    lambda properties, shape, chunks: _record(
        "TensorStorageMetadata", {"properties": properties, "size": Record(SIZE, (shape,)), "chunks": chunks}
    )
)
_CHUNK = Template(
    lambda offsets, sizes: _record(
        "ChunkStorageMetadata", {"offsets": Record(SIZE, (offsets,)), "sizes": Record(SIZE, (sizes,))}
    )
)
_KEY = Template(
    lambda name, number, offsets: _record(
        "MetadataIndex", {"fqn": name, "index": number, "offset": Record(SIZE, (offsets,))}
    )
)
_OBJECT_KEY = Template(lambda name: _record("MetadataIndex", {"fqn": name, "index": None}))
_PLACE = Template(
    lambda path, offset, length: Record(
        _STORAGE_INFO, (), True, state={"relative_path": path, "offset": offset, "length": length}
    )
)
