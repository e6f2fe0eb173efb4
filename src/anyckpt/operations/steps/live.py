"""Tensors of numpy and torch that are in memory, as lazy tensors: looked at in place, when they are written."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyckpt.dtypes import dtype, from_numpy
from anyckpt.errors import FormatError, UsageError
from anyckpt.indexing import Array
from anyckpt.pickling.torch_objects import ordered_dict
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.tensor import Constant, LazyTensor, Stored

_DEEPEST = 100


class Live:
    """Makes lazy tensors of what is in memory; what shares memory shares a source, so that ties stay ties."""

    def __init__(self) -> None:
        self._sources: dict[Any, ByteSource] = {}

    def tree(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        """The same with lazy tensors for tensors, in dictionaries, lists and tuples that can be pickled.

        Args:
            value: a tensor, a container of them, or anything else, which stays as it is.
            path: keys that lead to it, for messages.

        Raises:
            UsageError: a tensor has no elements in memory that can be written, or containers hold themselves.
        """
        if len(path) > _DEEPEST:
            raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
        if isinstance(value, Mapping):
            items = {key: self.tree(inner, (*path, key)) for key, inner in value.items()}
            if type(value) is not OrderedDict:
                return items
            versions = getattr(value, "_metadata", None)  # of the modules, as Module.state_dict() notes them
            return ordered_dict(items, metadata=self.tree(versions, path))
        if isinstance(value, list):
            return [self.tree(inner, (*path, index)) for index, inner in enumerate(value)]
        if isinstance(value, tuple):
            return tuple(self.tree(inner, (*path, index)) for index, inner in enumerate(value))
        if isinstance(value, np.generic):
            return value.item()
        name = ".".join(map(str, path))
        try:
            found = self.tensor(value)
        except (FormatError, UsageError) as error:
            raise error.told_as(UsageError, path=None, tensor=name) from None
        return value if found is None else found

    def tensor(self, value: Any) -> LazyTensor | None:
        """The lazy tensor of a tensor's elements; None of what is no tensor.

        Raises:
            FormatError: checkpoints have no such element type.
            UsageError: it has no elements in memory, or more than a type, a shape and elements.
        """
        torch = sys.modules.get("torch")
        if isinstance(value, LazyTensor):
            return value
        if torch is not None and isinstance(value, torch.Tensor):
            return self._of_torch(torch, value)
        if isinstance(value, np.ma.MaskedArray):
            raise UsageError("is a masked array, and its mask would be lost", remedy="give array.filled()")
        if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
            return self._of_numpy(np.asarray(value))
        return None

    def _of_numpy(self, array: Array) -> LazyTensor:
        kind = from_numpy(array.dtype)
        if not array.size:
            return Constant(kind, array.shape)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(step < 0 or step % kind.itemsize for step in array.strides):
            array = np.ascontiguousarray(array).reshape(array.shape)
        strides = tuple(step // kind.itemsize for step in array.strides)
        count = 1 + sum((length - 1) * step for length, step in zip(array.shape, strides, strict=True))
        key = array.__array_interface__["data"][0], count * kind.itemsize
        if key not in self._sources:
            raw = array.view(kind.raw)
            run = np.lib.stride_tricks.as_strided(raw, (count,), (kind.itemsize,), writeable=False)
            self._sources[key] = MemorySource(run)
        return Stored(self._sources[key], 0, kind, array.shape, strides)

    def _of_torch(self, torch: Any, tensor: Any) -> LazyTensor:
        problem = obstacle(torch, tensor)
        if problem is not None:
            raise problem
        kind = dtype(tensor.dtype)
        if not tensor.numel():
            return Constant(kind, tuple(tensor.shape))
        plain = tensor.detach().resolve_conj().resolve_neg()
        storage = plain.untyped_storage()
        key = str(plain.device), storage.data_ptr(), storage.nbytes()
        if key not in self._sources:
            run = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(storage)
            on_host = plain.device.type == "cpu"
            self._sources[key] = MemorySource(run.numpy()) if on_host else _DeviceSource(torch, run)
        strides = None if plain.is_contiguous() else tuple(plain.stride())
        return Stored(self._sources[key], plain.storage_offset() * kind.itemsize, kind, tuple(plain.shape), strides)


class _DeviceSource(ByteSource):
    """Bytes in an accelerator's memory, copied to the host as they are read."""

    __slots__ = ("_bytes", "_torch")

    def __init__(self, torch: Any, run: Any) -> None:
        self._torch = torch
        self._bytes = run
        self.name = str(run.device)
        self.path = None
        self.size = run.numel()

    def identity(self) -> None:
        """None: it is live state."""
        return

    @property
    def is_live(self) -> bool:
        return True

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        part = self._bytes[offset : offset + len(buffer)]
        self._torch.frombuffer(buffer, dtype=self._torch.uint8).copy_(part)


def obstacle(torch: Any, tensor: Any) -> UsageError | None:
    """Why a tensor is more than elements in memory, and what to give in its place; None if it is not."""
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        return UsageError("has no shape yet", remedy="call the module once, so that its parameters are made")
    if tensor.is_nested:
        return UsageError(
            "is a nested tensor, of rows of several lengths",
            remedy="give its rows, unbind(), or values() and offsets()",
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return UsageError(
            f"is a {type(tensor).__name__}, whose elements only it can tell",
            remedy="give a plain tensor: full_tensor() of a DTensor, dequantize() of a quantized one",
        )
    if tensor.device.type == "meta":
        return UsageError(
            "is of the meta device and has no elements",
            remedy="give it memory first, as module.to_empty(device=...), or the tensor that was loaded",
        )
    if tensor.is_quantized:
        return UsageError(
            "is quantized: numbers and their scale", remedy="give int_repr() and q_scale(), or dequantize()"
        )
    if tensor.layout is not torch.strided:
        return UsageError(
            f"is of layout {tensor.layout}", expected="torch.strided", remedy="give to_dense(), or its parts"
        )
    return None
