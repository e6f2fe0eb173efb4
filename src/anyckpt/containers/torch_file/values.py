"""What a torch file holds besides plain tensors and plain data: storages, and tensors of several parts.

All are inert: parts stay lazy, and nothing is computed until it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from anyckpt.checkpoint import CompositeTensor
from anyckpt.containers.torch_file.byteorder import SwappedSource
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_NAME, DType
from anyckpt.errors import FormatError, UsageError
from anyckpt.indexing import Array
from anyckpt.pickling import Global, Record
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored, from_array

_LARGEST_DENSE = 1 << 30


def brief(value: Any) -> str:
    """A few words on a value from a file, for a message: a hostile value's ``repr`` may be endless."""
    if type(value) is tuple and len(value) < 8:
        return f"({', '.join(map(_word, value))})"
    return _word(value)


def spelled(key: Any) -> str:
    """A dictionary key as a part of a name."""
    if type(key) is str:
        return key
    if type(key) is int and key.bit_length() < 256:
        return str(key)
    return str(key)[:100] if type(key) in (bool, float, type(None)) else f"<{type(key).__name__}>"


def brief_text(value: Any) -> str:
    """Text as it is; of anything else, a few words."""
    return value if type(value) is str else brief(value)


def _word(value: Any) -> str:
    if type(value) is int and value.bit_length() > 256:
        return "a very large number"
    if type(value) in (str, bytes):
        return repr(value[:60])
    if value is None or type(value) in (int, float, bool, Global):
        return repr(value)[:100]
    return f"a {value.path}" if isinstance(value, Record) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Storage:
    """A run of elements that tensors are views of.

    Attributes:
        key: name in the file.
        source: the bytes as stored, or None on the ``meta`` device.
        dtype: element type; None for an untyped storage.
        count: elements, or bytes of an untyped storage.
        location: device that it was saved from.
        big_endian: byte order of the elements in ``source``.
    """

    key: str
    source: ByteSource | None
    dtype: DType | None
    count: int
    location: str = "cpu"
    big_endian: bool = False
    _swapped: dict[int, ByteSource] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)

    def little_endian(self, dtype: DType) -> ByteSource:
        """The bytes in little-endian order, seen as elements of ``dtype``."""
        assert self.source is not None
        width = (self.dtype or dtype).component_size
        if not self.big_endian or width == 1:
            return self.source
        if width not in self._swapped:  # one source for all views, so that tied tensors are known to be tied
            self._swapped[width] = SwappedSource(self.source, width)
        return self._swapped[width]

    def tensor(self) -> LazyTensor:
        """All elements as a tensor of one axis; bytes if untyped."""
        kind = self.dtype or BY_NAME["uint8"]
        return Stored(self.little_endian(kind), 0, kind, (self.count,))


@dataclass(frozen=True)
class TensorFacts:
    """What a torch file says of a tensor besides its elements.

    Attributes:
        storage: key of its storage; tensors with the same key share memory.  Empty if it has none.
        storage_bytes: bytes of that storage.
        offset: elements before its first one.
        strides: elements between neighbours along each axis.
        location: device that it was saved from.
        requires_grad: as saved.
        parameter: whether it is a ``torch.nn.Parameter``.
        subclass: dotted name of another subclass of ``torch.Tensor``, or None.
        conjugate: the stored elements are the complex conjugates (torch's lazy bit); resolved when read.
        negative: the stored elements have the opposite sign; resolved when read.
        kind: the subclass as the file names it, or None.
        attributes: Python attributes, such as Megatron's ``tensor_model_parallel`` and ``partition_dim``.
    """

    storage: str = ""
    storage_bytes: int = 0
    offset: int = 0
    strides: tuple[int, ...] = ()
    location: str = "cpu"
    requires_grad: bool = False
    parameter: bool = False
    subclass: str | None = None
    conjugate: bool = False
    negative: bool = False
    kind: Global | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FormedTensor:
    """A dense tensor with the form in which a torch file is to have it.

    Attributes:
        tensor: its elements.
        held: the elements that are stored, along one axis or as many as the tensor has; others may share them.
        offset: elements of ``held`` before its first one.
        strides: elements of ``held`` between neighbours along each axis.
        facts: whether it is a parameter, and the like.
    """

    tensor: LazyTensor
    held: LazyTensor
    offset: int
    strides: tuple[int, ...]
    facts: TensorFacts


@dataclass(frozen=True)
class MetaTensor:
    """A tensor of the ``meta`` device: it has a shape and no elements."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SparseTensor(CompositeTensor):
    """A sparse tensor in its parts.

    Attributes:
        layout: ``sparse_coo``, ``sparse_csr``, ``sparse_csc``, ``sparse_bsr`` or ``sparse_bsc``.
        shape: of the tensor that it stands for.
        parts: ``indices`` and ``values`` of a COO tensor; ``compressed_indices``, ``plain_indices`` and ``values``
            otherwise.
        coalesced: whether a COO tensor states that no index is twice, or None.
    """

    layout: str
    shape: tuple[int, ...]
    parts: Mapping[str, LazyTensor]
    coalesced: bool | None = None

    @property
    def dtype(self) -> DType:
        return self.parts["values"].dtype

    def part_tensors(self) -> dict[str, LazyTensor]:
        """As the base says."""
        return dict(self.parts)

    def companions(self) -> dict[str, LazyTensor]:
        """The shape, which the indices of a COO tensor do not tell.

        Raises:
            UsageError: another layout: rows and columns have the same names.
        """
        if self.layout != "sparse_coo":
            raise UsageError(
                f"is a {self.layout} tensor, and its parts alone do not say so",
                remedy="leave it out with --exclude, or convert to torch or dcp",
            )
        return {"shape": _numbers(self.shape)}

    def dense(self) -> Array:
        """The tensor with its zeros; elements of an index that is there twice are added.

        Raises:
            FormatError: an index lies outside the tensor, or the parts do not fit one another.
            UsageError: more than 1 GiB.
        """
        if math.prod(self.shape) * self.dtype.itemsize > _LARGEST_DENSE:
            raise UsageError(
                "a sparse tensor is too large to be made dense", expected="at most 1 GiB", found=self.shape
            )
        values = self.parts["values"].numpy()
        result: Array = np.zeros(self.shape, dtype=values.dtype)
        try:
            index = self._coo_index() if self.layout == "sparse_coo" else self._compressed_index(values)
            if index is not None:
                if self.layout in ("sparse_bsr", "sparse_bsc"):
                    _add_blocks(result, index, values)
                elif values.dtype == np.bool_:
                    np.logical_or.at(result, index, values)
                else:
                    np.add.at(result, index, values)
        except (IndexError, ValueError, ZeroDivisionError, MemoryError) as error:
            raise FormatError("the parts of a sparse tensor do not fit one another", found=str(error)) from error
        return result

    def _coo_index(self) -> tuple[Array, ...]:
        indices = self.parts["indices"].numpy()
        if indices.size and indices.min() < 0:
            raise IndexError("a negative index")
        return tuple(indices)

    def _compressed_index(self, values: Array) -> tuple[Array, ...]:
        compressed = self.parts["compressed_indices"].numpy()
        plain = self.parts["plain_indices"].numpy()
        if compressed.ndim != 1 or len(self.shape) != 2:
            raise ValueError("a batch of sparse tensors")
        counts = np.diff(compressed)
        if (counts < 0).any() or int(counts.sum()) != len(values) or (plain.size and plain.min() < 0):
            raise ValueError("compressed indices that do not count the values")
        lines = np.repeat(np.arange(len(counts)), counts)
        return (lines, plain) if self.layout in ("sparse_csr", "sparse_bsr") else (plain, lines)


def _numbers(value: int | tuple[int, ...]) -> LazyTensor:
    return from_array(np.array(value, dtype=np.int64))


def _tensors_in(value: object, names: tuple[str, ...]) -> dict[str, LazyTensor]:
    return {name: part for name in names if isinstance(part := getattr(value, name), LazyTensor)}


def _add_blocks(result: Array, index: tuple[Array, ...], values: Array) -> None:
    rows, columns = values.shape[1:]
    tiles = result.reshape(result.shape[0] // rows, rows, result.shape[1] // columns, columns)
    tiles = tiles.transpose(0, 2, 1, 3)
    np.add.at(tiles, index, values)


@dataclass(frozen=True)
class QuantizedTensor(CompositeTensor):
    """A tensor of one of torch's quantized types: ``scale * (int_repr - zero_point)``.

    Attributes:
        int_repr: the integers, as torch's ``int_repr()``: uint8, int8 or int32; one axis of bytes for packed types.
        shape: of the tensor.
        dtype: ``quint8``, ``qint8``, ``qint32``, ``quint4x2`` or ``quint2x4``.
        scheme: ``per_tensor_affine``, ``per_channel_affine``, ...
        scale: a number, or a tensor with one per channel.
        zero_point: likewise.
        axis: axis of the channels, or None.
    """

    int_repr: LazyTensor
    shape: tuple[int, ...]
    dtype: DType
    scheme: str
    scale: Any
    zero_point: Any
    axis: int | None = None

    def part_tensors(self) -> dict[str, LazyTensor]:
        """As the base says: of scale and zero point only if they are tensors."""
        return _tensors_in(self, ("int_repr", "scale", "zero_point"))

    def companions(self) -> dict[str, LazyTensor]:
        """Scale and zero point where they are numbers, the axis of channels, and the shape of packed integers.

        Raises:
            UsageError: scale or zero point is something else.
        """
        found: dict[str, LazyTensor] = {}
        if type(self.scale) in (int, float) and type(self.zero_point) is int and self.zero_point.bit_length() < 64:
            found["scale"] = from_array(np.array(self.scale, dtype=np.float64))
            found["zero_point"] = from_array(np.array(self.zero_point, dtype=np.int64))
        elif not isinstance(self.scale, LazyTensor) or not isinstance(self.zero_point, LazyTensor):
            raise UsageError("is quantized with a scale or zero point that is no number", found=brief(self.scale))
        if self.axis is not None:
            found["axis"] = _numbers(self.axis)
        if self.int_repr.shape != self.shape:
            found["shape"] = _numbers(self.shape)
        return found


@dataclass(frozen=True)
class NestedTensor(CompositeTensor):
    """Tensors of different shapes in one buffer; each has a row of ``sizes`` and ``strides`` and one of ``offsets``."""

    buffer: LazyTensor
    sizes: LazyTensor
    strides: LazyTensor
    offsets: LazyTensor

    def part_tensors(self) -> dict[str, LazyTensor]:
        """As the base says."""
        return _tensors_in(self, ("buffer", "sizes", "strides", "offsets"))

    def companions(self) -> dict[str, LazyTensor]:
        """None: its parts say all."""
        return {}


@dataclass(frozen=True)
class DistributedTensor:
    """One rank's part of a ``DTensor``.

    Attributes:
        local: the part that this file holds.
        shape: of the whole.
        placements: one per axis of the device mesh: ``Shard(0)``, ``Replicate()``, ``Partial(sum)``, ...
        spec: everything that the file says about the distribution, as an inert record.
        arguments: what the class was made with, as inert records: class, dtype, size, ...
    """

    local: LazyTensor
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    spec: Any
    arguments: tuple[Any, ...] = ()


def usual(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of C order, as torch has them: an axis of length zero counts as one."""
    steps = [1]
    for n in reversed(shape[1:]):
        steps.append(steps[-1] * max(n, 1))
    return tuple(reversed(steps)) if shape else ()
