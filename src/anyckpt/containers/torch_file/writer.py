"""Lays out what ``torch.save`` of torch 2.13 writes, so that ``torch.load(weights_only=True, mmap=True)`` takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyckpt.checkpoint import storage_key
from anyckpt.containers.torch_file.layout import Record as ZipRecord
from anyckpt.containers.torch_file.layout import zip_layout
from anyckpt.containers.torch_file.values import (
    DistributedTensor,
    FormedTensor,
    MetaTensor,
    NestedTensor,
    QuantizedTensor,
    SparseTensor,
    Storage,
    spelled,
    usual,
)
from anyckpt.dtypes import BY_NAME, DType
from anyckpt.engine.plan import Literal, Part, TensorData
from anyckpt.errors import UsageError
from anyckpt.pickling import DictRecord, Global, PersistentId, Record, dumps
from anyckpt.pickling import torch_objects as objects
from anyckpt.pickling.walk import find_leaves
from anyckpt.tensor import LazyTensor, Stored

Path = tuple[Any, ...]

ALIGNMENT = 64
"""Where torch lets a record's contents begin."""
PAGE = 4096
"""Where contents of at least ``LARGE`` bytes begin, counted in the file: memory maps and direct I/O want it."""
LARGE = 1 << 20


def dotted(path: Path) -> str:
    """The name of a tensor at ``path``: keys and indices joined by dots."""
    return ".".join(map(spelled, path))


def zip_parts(
    root: object,
    *,
    archive_name: str = "archive",
    file_offset: int = 0,
    alignment: int = ALIGNMENT,
    page: int = PAGE,
    tensor_name: Callable[[Path], str] = dotted,
) -> tuple[Part, ...]:
    """The parts of a torch file that holds ``root``.

    Tensors that are the same view of the same stored bytes share one record (tied weights stay tied), and a
    tensor that repeats elements is stored once and repeated by its strides.  Tensors are written contiguous
    and without attributes, but those that are a ``FormedTensor``.

    Args:
        root: plain data, inert records, lazy tensors and ``values``, nested in any way.
        archive_name: root folder inside the archive.
        file_offset: where the archive begins in the file that the parts are for.
        alignment: of each record's contents.
        page: of the contents of tensors of at least 1 MiB, if larger.  An archive with such a tensor has no record
            ``.format_version``: with it, torch may compute where contents lie instead of looking, by a rule
            that knows one alignment (``torch.utils.serialization.config.load.calculate_storage_offsets``).
        tensor_name: name of the tensor at a path, for messages and the manifest.

    Raises:
        UsageError: an object that no pickle can hold.
    """
    if not archive_name or "/" in archive_name:
        raise UsageError("a torch file's root folder must be a plain name", found=repr(archive_name))
    storages = _Storages(root, tensor_name)
    pickle = dumps(root, stand_in=storages.stand_in, name=archive_name)
    large = page > alignment and any(tensor.nbytes >= LARGE for _, tensor in storages.records)
    records = [ZipRecord(f"{archive_name}/data.pkl", Literal(pickle), alignment)]
    if not large:
        records.append(ZipRecord(f"{archive_name}/.format_version", Literal(b"1"), alignment))
        stated = str(alignment).encode()
        records.append(ZipRecord(f"{archive_name}/.storage_alignment", Literal(stated), alignment))
    records.append(ZipRecord(f"{archive_name}/byteorder", Literal(b"little"), alignment))
    for key, (name, tensor) in enumerate(storages.records):
        where = page if large and tensor.nbytes >= LARGE else alignment
        records.append(ZipRecord(f"{archive_name}/data/{key}", TensorData(name, tensor), where))
    records.append(ZipRecord(f"{archive_name}/version", Literal(b"3\n"), alignment))
    return zip_layout(records, archive_name, file_offset if large else 0)


def tensor_zip_parts(
    name: str, tensor: LazyTensor, *, file_offset: int = 0, alignment: int = ALIGNMENT, page: int = PAGE
) -> tuple[Part, ...]:
    """The parts of a torch file that holds one tensor: an item of a ``.distcp`` file.

    Args:
        name: the tensor's, for messages and the manifest.
        tensor: the tensor.
        file_offset: where the archive begins in its file.
        alignment: as for ``zip_parts``.
        page: as for ``zip_parts``.
    """
    return zip_parts(tensor, file_offset=file_offset, alignment=alignment, page=page, tensor_name=lambda path: name)


class _Storages:
    """Stands in for tensors while a pickle is written, and collects what they are stored as.

    Attributes:
        records: name and contents of each storage, in the order of their keys.
    """

    def __init__(self, root: object, tensor_name: Callable[[Path], str]) -> None:
        self.records: list[tuple[str, LazyTensor]] = []
        self._names: dict[int, str] = {}
        self._keys: dict[Any, str] = {}
        self._made: dict[int, tuple[Any, Any]] = {}
        for path, leaf in find_leaves(root, lambda value: type(value) in _STAND_INS or isinstance(value, LazyTensor)):
            self._names.setdefault(id(leaf), tensor_name(path))

    def stand_in(self, value: Any) -> Any:
        """What to pickle in place of a tensor, or the value itself if it is none."""
        known = self._made.get(id(value))
        if known is None:
            make = _STAND_INS.get(type(value), _dense if isinstance(value, LazyTensor) else None)
            if make is None:
                return value
            known = self._made[id(value)] = (value, make(self, value))
        return known[1]

    def store(self, value: Any, tensor: LazyTensor, dtype: DType | None) -> PersistentId:
        """The reference to the elements of ``tensor``, under the name of ``value``, which it belongs to."""
        # A tensor alone shares with nobody, and its place may cost a read to find out.
        found = storage_key(tensor) if len(self._names) > 1 else None
        kind = BY_NAME["uint8"] if dtype is None else dtype  # bytes, which torch lets an untyped storage share
        key = None if found is None else self._keys.get((found, kind))
        if key is None:
            key = str(len(self.records))
            self.records.append((self._names.get(id(value), key), tensor))
            if found is not None:
                self._keys[found, kind] = key
        if dtype is None:
            return PersistentId(("storage", objects.UNTYPED_STORAGE, key, "cpu", tensor.nbytes))
        return objects.storage(dtype, key, tensor.size)

    def part(self, whole: Any, name: str, value: Any) -> Any:
        """Name a part of a value of several parts, which the walk over the root does not see."""
        if isinstance(value, LazyTensor):
            self._names[id(value)] = f"{self._names.get(id(whole), '')}.{name}".lstrip(".")
        return value


def _dense(storages: _Storages, tensor: LazyTensor) -> Record:
    held, strides = _unrepeated(tensor)
    reference = storages.store(tensor, held, tensor.dtype)
    return objects.tensor(reference, 0, tensor.shape, strides, dtype=tensor.dtype)


def _formed(storages: _Storages, value: FormedTensor) -> Record:
    """As torch's ``Tensor`` and ``Parameter`` reduce themselves."""
    dtype, facts, state = value.tensor.dtype, value.facts, dict(value.facts.attributes)
    reference = storages.store(value, value.held, dtype)
    asked = facts.requires_grad and not facts.parameter
    tensor = objects.tensor(
        reference, value.offset, value.tensor.shape, value.strides, dtype=dtype, requires_grad=asked
    )
    if facts.parameter:
        arguments = (tensor, facts.requires_grad, DictRecord(objects.ORDERED_DICT), *([state] if state else []))
        return Record(Global("torch._utils", f"_rebuild_parameter{'_with_state' if state else ''}"), arguments)
    if facts.kind is None and not state:
        return tensor
    arguments = (tensor.type, facts.kind or Global("torch", "Tensor"), tensor.args, state)
    return Record(Global("torch._tensor", "_rebuild_from_type_v2"), arguments)


def _unrepeated(tensor: LazyTensor) -> tuple[LazyTensor, tuple[int, ...]]:
    """What to store of a tensor, and the strides by which it is the tensor: an expanded axis has stride 0."""
    if not isinstance(tensor, Stored) or not tensor.strides or not tensor.size:
        return tensor, usual(tensor.shape)
    repeated = [n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    if not any(repeated):
        return tensor, usual(tensor.shape)
    shape = tuple(1 if again else n for n, again in zip(tensor.shape, repeated, strict=True))
    strides = tuple(0 if again else s for s, again in zip(usual(shape), repeated, strict=True))
    return tensor.box((0,) * tensor.ndim, shape), strides


def _storage(storages: _Storages, storage: Storage) -> Any:
    if storage.source is None:
        raise UsageError("a storage of the meta device cannot be written")
    return storages.store(storage, storage.tensor(), storage.dtype)


def _meta(storages: _Storages, tensor: MetaTensor) -> Record:
    arguments = (objects.dtype_global(tensor.dtype), tensor.shape, usual(tensor.shape), False)
    return Record(Global("torch._utils", "_rebuild_meta_tensor_no_storage"), arguments)


def _sparse(storages: _Storages, tensor: SparseTensor) -> Record:
    layout = Record(Global("torch.serialization", "_get_layout"), (f"torch.{tensor.layout}",))
    data = tuple(storages.part(tensor, name, part) for name, part in tensor.parts.items())
    rest = () if tensor.coalesced is None else (tensor.coalesced,)
    return Record(
        Global("torch._utils", "_rebuild_sparse_tensor"), (layout, (*data, objects.size(tensor.shape), *rest))
    )


def _quantized(storages: _Storages, tensor: QuantizedTensor) -> Record:
    storages.part(tensor, "int_repr", tensor.int_repr)
    reference = storages.store(tensor.int_repr, tensor.int_repr, tensor.dtype)
    numbers = (
        storages.part(tensor, "scale", tensor.scale),
        storages.part(tensor, "zero_point", tensor.zero_point),
    )
    scheme = (Global("torch", tensor.scheme), *numbers, *(() if tensor.axis is None else (tensor.axis,)))
    arguments = (reference, 0, tensor.shape, usual(tensor.shape), scheme, False, DictRecord(objects.ORDERED_DICT))
    return Record(Global("torch._utils", "_rebuild_qtensor"), arguments)


def _nested(storages: _Storages, tensor: NestedTensor) -> Record:
    parts = ("buffer", "sizes", "strides", "offsets")
    data = tuple(storages.part(tensor, name, getattr(tensor, name)) for name in parts)
    return Record(Global("torch._utils", "_rebuild_nested_tensor"), data)


def _distributed(storages: _Storages, tensor: DistributedTensor) -> Record:
    state = (None, {"_local_tensor": storages.part(tensor, "local", tensor.local), "_spec": tensor.spec})
    wrapper = Global("torch._utils", "_rebuild_wrapper_subclass")
    arguments = (wrapper, tensor.arguments[0], tensor.arguments, state)
    return Record(Global("torch._tensor", "_rebuild_from_type_v2"), arguments)


_STAND_INS: dict[type, Callable[[_Storages, Any], Any]] = {
    FormedTensor: _formed,
    Storage: _storage,
    MetaTensor: _meta,
    SparseTensor: _sparse,
    QuantizedTensor: _quantized,
    NestedTensor: _nested,
    DistributedTensor: _distributed,
}
