"""The index of a distributed checkpoint: ``.metadata``, a pickle of ``torch.distributed.checkpoint.metadata``.

A checkpoint of two thousand ranks has a million chunks, and each is described by three pickled objects.  They
are kept as packed integers while the pickle is read, and what only a saver needs (the cached plans that
Megatron-Core puts in) is dropped as it comes.

Facts: torch 1.12 to 2.13 ``torch/distributed/checkpoint/{metadata,filesystem,planner}.py``, Megatron-Core 0.12
to 0.20 ``dist_checkpointing/strategies/torch.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_NAME, DType
from anyckpt.errors import FormatError
from anyckpt.pickling import Global, Record, load
from anyckpt.pickling.alike import Make, Planned
from anyckpt.storage.source import ByteSource

LARGEST = 1 << 60
"""Offsets and lengths of more elements or bytes than this are damage; sums of two still fit in 64 bits."""

_PACKAGES = ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
_DROPPED = (
    "planner.SavePlan",
    "planner.WriteItem",
    "planner.WriteItemType",
    "planner.TensorWriteData",
    "planner.BytesIOWriteData",
)
_DAMAGED = "the index is damaged; copy the checkpoint again from its origin"


class Chunk:
    """A ``ChunkStorageMetadata``: offsets, then sizes, as little-endian 64-bit integers."""

    __slots__ = ("packed",)
    packed: bytes

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict):
            raise FormatError("a chunk has no fields")
        offsets = _extents(state.get("offsets"), "a chunk's offsets")
        sizes = _extents(state.get("sizes"), "a chunk's sizes")
        if len(offsets) != len(sizes):
            raise FormatError("a chunk has as many offsets as sizes", expected=len(sizes), found=len(offsets))
        self.packed = struct.pack(f"<{2 * len(offsets)}q", *offsets, *sizes)


class ItemKey:
    """A ``MetadataIndex``: the name of an item and, for a tensor's chunk, its packed offsets (else None)."""

    __slots__ = ("name", "packed")
    name: str
    packed: bytes | None

    def set_state(self, state: object) -> None:
        name = state.get("fqn") if isinstance(state, dict) else None
        if not isinstance(state, dict) or not isinstance(name, str):
            raise FormatError("an item of the index has no name")
        self.name = name
        offset = state.get("offset")
        if offset is None:
            self.packed = None
        else:
            numbers = _extents(offset, "an item's offset")
            self.packed = struct.pack(f"<{len(numbers)}q", *numbers)


class ItemPlace:
    """A ``_StorageInfo``: where an item lies."""

    __slots__ = ("length", "offset", "path", "transforms")
    path: str
    offset: int
    length: int
    transforms: object

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict):
            raise FormatError("an item's place has no fields")
        path, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
        if not isinstance(path, str):
            raise FormatError("an item's place names no file", found=type(path).__name__)
        for number in (offset, length):
            if type(number) is not int or not 0 <= number < LARGEST:
                raise FormatError("an item's offset or length is out of range", found=f"{offset!r}, {length!r}")
        assert isinstance(offset, int) and isinstance(length, int)
        self.path, self.offset, self.length = path, offset, length
        self.transforms = state.get("transform_descriptors") or None


def _chunks_like(fields: Sequence[str], chunk: Chunk) -> Make | None:
    axes = len(fields) // 2
    if fields != ("offsets",) * axes + ("sizes",) * axes or len(chunk.packed) != 16 * axes:
        return None
    pack = struct.Struct(f"<{2 * axes}q").pack

    def make(numbers: list[Any]) -> Chunk:
        made = Chunk()
        made.packed = pack(*numbers)
        return made

    return make


def _keys_like(fields: Sequence[str], key: ItemKey) -> Make | None:
    if fields.count("fqn") != 1:
        return None
    name, axes = fields.index("fqn"), fields.count("offset")
    begin = fields.index("offset") if axes else 0
    end = begin + axes
    if fields[begin:end] != ("offset",) * axes or len(key.packed or b"") != 8 * axes:
        return None
    pack, nowhere = struct.Struct(f"<{axes}q").pack, key.packed is None

    def make(values: list[Any]) -> ItemKey:
        made = ItemKey()
        made.name = values[name]
        made.packed = None if nowhere else pack(*values[begin:end])
        return made

    return make


def _places_like(fields: Sequence[str], place: ItemPlace) -> Make | None:
    if sorted(fields) != ["length", "offset", "relative_path"] or place.transforms is not None:
        return None
    path, offset, length = (fields.index(field) for field in ("relative_path", "offset", "length"))

    def make(values: list[Any]) -> ItemPlace:
        made = ItemPlace()
        made.path, made.offset, made.length, made.transforms = values[path], values[offset], values[length], None
        return made

    return make


class _Dropped:
    """Stands for everything that only a saver needs."""

    __slots__ = ()

    def set_state(self, state: object) -> None:
        pass


_dropped = _Dropped()


def _extents(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise FormatError(f"{what} are not a list of numbers", found=type(value).__name__)
    for number in value:
        if type(number) is not int or not 0 <= number < LARGEST:
            raise FormatError(f"{what} are out of range", expected="numbers from 0 on", found=str(value)[:100])
    return tuple(value)


def _new(kind: type[Any]) -> Callable[[tuple[Any, ...]], Any]:
    return lambda args: kind() if not args else NotImplemented


def _constructors() -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    table: dict[str, Callable[[tuple[Any, ...]], Any]] = {
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan": lambda args: _dropped
    }
    for package in _PACKAGES:
        table[f"{package}.metadata.ChunkStorageMetadata"] = _new(Chunk)
        table[f"{package}.metadata.MetadataIndex"] = _new(ItemKey)
        table[f"{package}.filesystem._StorageInfo"] = _new(ItemPlace)
        for name in _DROPPED:
            table[f"{package}.{name}"] = lambda args: _dropped
    return table


def _alike() -> dict[str, Planned]:
    table: dict[str, Planned] = {}
    for package in _PACKAGES:
        table[f"{package}.metadata.ChunkStorageMetadata"] = _chunks_like
        table[f"{package}.metadata.MetadataIndex"] = _keys_like
        table[f"{package}.filesystem._StorageInfo"] = _places_like
        for name in _DROPPED:
            table[f"{package}.{name}"] = lambda fields, one: lambda values: _dropped
    return table


@dataclass
class TensorEntry:
    """What the index says of one tensor.

    Attributes:
        dtype: element type.
        shape: the whole tensor's.
        chunks: its pieces, in the order of the index, each packed offsets and sizes.
    """

    dtype: DType
    shape: tuple[int, ...]
    chunks: list[bytes]


@dataclass
class Index:
    """A ``.metadata`` as plain data.

    Attributes:
        tensors: by name.
        objects: names of items that are not tensors.
        places: name -> packed offset (None for an object) -> where the item lies.
        paths: ``planner_data``: name -> keys from the root of the nested state, or None if not recorded.
        version: DCP's version string, or None before torch 2.7 or so.
        metadata_class: dotted class of the pickled index.
        extra: further attributes of the index (``mcore_data``), cached plans left out.
        warnings: anything odd.
    """

    tensors: dict[str, TensorEntry]
    objects: list[str]
    places: dict[str, dict[bytes | None, ItemPlace]]
    paths: dict[str, tuple[str | int, ...]] | None
    version: str | None
    metadata_class: str
    extra: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_index(source: ByteSource) -> Index:
    """The index in a ``.metadata`` file; nothing that it names is imported.

    Raises:
        FormatError: it is empty, damaged, or not such an index.
        UnsafeError: the pickle does what no index does.
    """
    if source.size == 0:
        raise FormatError("is empty", path=source.name, remedy="the save was interrupted; use another checkpoint")
    root = load(source.read_all(limit=1 << 36), constructors=_constructors(), alike=_alike(), name=source.name)
    if not isinstance(root, Record) or not isinstance(root.get("state_dict_metadata"), dict):
        raise FormatError(
            "is not the index of a distributed checkpoint",
            path=source.name,
            expected="a pickled torch.distributed.checkpoint Metadata",
            found=root.path if isinstance(root, Record) else type(root).__name__,
        )
    try:
        return _index(root)
    except FormatError as problem:
        if problem.path is None:
            problem.path = source.name
            problem.remedy = problem.remedy or _DAMAGED
        raise


def _index(root: Record) -> Index:
    fields = root.fields()
    tensors: dict[str, TensorEntry] = {}
    objects: list[str] = []
    for key, entry in fields["state_dict_metadata"].items():
        if not isinstance(key, str) or not isinstance(entry, Record):
            raise FormatError("an entry of the index is not understood", found=repr(key)[:100])
        if entry.path.endswith(".BytesStorageMetadata"):
            objects.append(key)
        else:
            tensors[key] = _tensor_entry(key, entry)
    version = fields.get("version")
    known = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version", "all_local_plans")
    return Index(
        tensors,
        objects,
        _places(fields.get("storage_data")),
        _paths(fields.get("planner_data")),
        version if isinstance(version, str) else None,
        root.path,
        {key: value for key, value in fields.items() if isinstance(key, str) and key not in known},
    )


def _tensor_entry(name: str, entry: Record) -> TensorEntry:
    properties, shape, chunks = entry.get("properties"), entry.get("size"), entry.get("chunks")
    state = properties.state if isinstance(properties, Record) else None
    # A tuple since torch 2.0; its length differs between forks (MindSpeed leaves layout and memory format out).
    found = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        found = state.get("dtype")
    if not isinstance(found, Global) or found.module != "torch" or found.name not in BY_NAME:
        raise FormatError(
            "the index gives no known element type",
            tensor=name,
            found=found.path if isinstance(found, Global) else type(found).__name__,
        )
    if not isinstance(chunks, list) or not all(type(chunk) is Chunk for chunk in chunks):
        raise FormatError("the index gives no list of chunks", tensor=name)
    try:
        extents = _extents(shape, "the lengths of the axes")
        packed = [chunk.packed for chunk in chunks]
    except FormatError as problem:
        problem.tensor = name
        raise
    except AttributeError:
        raise FormatError("a chunk has no offsets and sizes", tensor=name) from None
    if any(len(chunk) != 16 * len(extents) for chunk in packed):
        raise FormatError("a chunk has another number of axes than the tensor", tensor=name, expected=len(extents))
    return TensorEntry(BY_NAME[found.name], extents, packed)


def _places(storage: object) -> dict[str, dict[bytes | None, ItemPlace]]:
    if not isinstance(storage, dict):
        raise FormatError("the index does not say where its items lie", expected="a dictionary storage_data")
    places: dict[str, dict[bytes | None, ItemPlace]] = {}
    while storage:
        key, place = storage.popitem()
        if type(key) is not ItemKey or type(place) is not ItemPlace:
            raise FormatError("the place of an item is not understood", found=f"{type(key).__name__} in storage_data")
        try:
            offset, _ = key.packed, place.length
        except AttributeError:
            raise FormatError("an item or its place has no fields") from None
        if places.setdefault(key.name, {}).setdefault(offset, place) is not place:
            raise FormatError("an item is listed twice", tensor=key.name)
    return places


def _paths(planner_data: object) -> dict[str, tuple[str | int, ...]] | None:
    if not isinstance(planner_data, dict):
        return None
    paths: dict[str, tuple[str | int, ...]] = {}
    for name, path in planner_data.items():
        if isinstance(name, str) and isinstance(path, tuple) and all(type(key) in (str, int) for key in path):
            paths[name] = path
    return paths


def merge(indices: Mapping[str, Index]) -> Index:
    """One index from those that the ranks wrote each for itself (``save(use_collectives=False)``).

    Nothing removed what several ranks hold, so the first rank's copy of a chunk counts.

    Args:
        indices: file name -> index, in rank order.

    Raises:
        FormatError: two ranks disagree on a tensor's shape or element type.
    """
    merged = Index({}, [], {}, {}, None, "")
    paths: dict[str, tuple[str | int, ...]] = {}
    for file, index in indices.items():
        for name, entry in index.tensors.items():
            first = merged.tensors.setdefault(name, TensorEntry(entry.dtype, entry.shape, []))
            if (first.dtype, first.shape) != (entry.dtype, entry.shape):
                raise FormatError(
                    "ranks disagree on a tensor",
                    path=file,
                    tensor=name,
                    expected=f"{first.dtype.name} {first.shape}",
                    found=f"{entry.dtype.name} {entry.shape}",
                )
            known = set(first.chunks)
            first.chunks += [chunk for chunk in entry.chunks if chunk not in known]
        merged.objects += [name for name in index.objects if name not in merged.places]
        for name, places in index.places.items():
            merged.places.setdefault(name, {}).update(
                {offset: place for offset, place in places.items() if offset not in merged.places.get(name, {})}
            )
        paths.update(index.paths or {})
        merged.version, merged.metadata_class = index.version, index.metadata_class
        merged.extra.update(index.extra)
    merged.paths = paths or None
    return merged
