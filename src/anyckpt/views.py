"""Stored elements as arrays of numpy and torch, without a copy where a file has them as they are in memory.

Such an array is the file, mapped into memory: nothing is read before it is looked at.  numpy's are read-only.  torch
knows no read-only tensors, so its are private mappings: what is written to them stays in the process.  A file that is
cut short meanwhile ends the process, as with any mapping; one that is replaced by a rename does not matter.
"""

from __future__ import annotations

import mmap
import os
import sys
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.errors import MissingLibraryError, UsageError
from anyckpt.indexing import Array, c_strides

if TYPE_CHECKING:
    from anyckpt.tensor import LazyTensor

_files: WeakValueDictionary[tuple[Any, ...], mmap.mmap] = WeakValueDictionary()
_lock = Lock()

_CODES = {"quint8": "uint8", "qint8": "int8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
"""Types whose numbers are nothing without a scale; torch calls what is stored of them ``int_repr``."""


def mapped_array(tensor: LazyTensor) -> Array | None:
    """The elements of a tensor as a read-only array that is its file; None if none has them so."""
    place = _place(tensor)
    if place is None or not tensor.size:
        return None
    path, offset, strides = place
    mapping = _mapping(path)
    if mapping is None or offset + _span(tensor, strides) > len(mapping):
        return None
    itemsize = tensor.dtype.itemsize
    array: Array = np.ndarray(
        tensor.shape, tensor.dtype.raw, mapping, offset, tuple(step * itemsize for step in strides)
    )
    return array if tensor.dtype.numpy is None else array.view(tensor.dtype.numpy)


def array_of(tensor: LazyTensor, dtype: Any, copy: bool | None) -> Array:
    """What ``__array__`` gives.

    Args:
        tensor: the tensor.
        dtype: numpy's type to convert to, or None.
        copy: an array of one's own (True), a mapping of the file (False), or this where possible (None).

    Raises:
        FormatError: bytes are missing from a file.
        ValueError: ``copy`` is False and there is no array without one.
    """
    array = None if copy else mapped_array(tensor)
    wanted = None if dtype is None else np.dtype(dtype)
    if copy is False and (array is None or wanted not in (None, array.dtype)):
        raise ValueError(f"{tensor!r} is no array of {wanted or tensor.dtype.name} without a copy")
    if array is None:
        array = tensor.numpy()
    return array if wanted is None else array.astype(wanted, copy=False)


def for_dlpack(tensor: LazyTensor) -> Any:
    """What hands the elements on to a library that asks for them by ``__dlpack__``: torch's tensor if torch is in use.

    Raises:
        BufferError: neither torch is in use nor has numpy such an element type.
    """
    if "torch" in sys.modules:
        return TorchFiles().tensor(tensor)
    array = tensor.numpy()
    if tensor.dtype.numpy is None or array.dtype.kind == "V":
        raise BufferError(f"numpy has no {tensor.dtype.name} to hand on")
    return array


class TorchFiles:
    """Files mapped for torch, each once: what shares bytes in a file shares them in memory."""

    def __init__(self) -> None:
        self._torch = torch_library()
        self._storages: dict[str, Any] = {}

    def tensor(self, tensor: LazyTensor, *, copy: bool | None = None) -> Any:
        """A ``torch.Tensor`` of the elements.

        Args:
            tensor: the tensor.
            copy: a tensor with memory of its own (True), a private mapping of the file (False), or this where
                possible (None).

        Raises:
            FormatError: bytes are missing from a file.
            UsageError: this torch has no such element type, or ``copy`` is False and there is none without one.
        """
        kind = self._dtype(tensor.dtype)
        view = None if copy else self._mapped(tensor, kind)
        if view is not None:
            return view
        if copy is False:
            raise UsageError(
                "is no tensor of torch without a copy",
                found=repr(tensor),
                expected="elements of a plain local file",
                remedy="leave copy out",
            )
        if not tensor.size:
            return self._torch.empty(tensor.shape, dtype=kind, device="cpu")
        elements = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        return self._torch.from_numpy(elements).view(kind).reshape(tensor.shape)

    def _dtype(self, dtype: DType) -> Any:
        kind = getattr(self._torch, _CODES.get(dtype.name, dtype.name), None)
        if kind is None:
            raise UsageError(
                f"torch {self._torch.__version__} has no element type {dtype.name}",
                remedy="take tensor.numpy(), or cast the tensor",
            )
        return kind

    def _mapped(self, tensor: LazyTensor, kind: Any) -> Any:
        place = _place(tensor)
        if place is None or not tensor.size:
            return None
        path, offset, strides = place
        storage = self._storage(path)
        if storage is None or offset + _span(tensor, strides) > storage.nbytes():
            return None
        empty = self._torch.empty(0, dtype=kind, device="cpu")  # also where torch.device() says otherwise
        return empty.set_(storage, offset // tensor.dtype.itemsize, tensor.shape, strides)

    def _storage(self, path: str) -> Any:
        if path not in self._storages:
            try:
                found = self._torch.UntypedStorage.from_file(path, False, os.stat(path).st_size)
            except (OSError, RuntimeError):  # more than may be mapped, or no file any more, which reading tells better
                found = None
            self._storages[path] = found
        return self._storages[path]


def torch_library() -> Any:
    """The module ``torch``.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        return import_module("torch")
    except ImportError as error:
        raise MissingLibraryError(
            f"tensors of torch need torch: {error}", remedy="pip install torch, or take numpy arrays"
        ) from error


def _place(tensor: LazyTensor) -> tuple[str, int, tuple[int, ...]] | None:
    """File, byte and strides of a tensor's elements, if a local file has them aligned and in this machine's order."""
    piece = tensor.region()
    if piece is None or sys.byteorder != "little":
        return None
    path, start = piece.source.locate()
    offset = start + piece.offset
    if path is None or offset % tensor.dtype.itemsize:
        return None
    return path, offset, piece.strides or c_strides(piece.shape)


def _span(tensor: LazyTensor, strides: tuple[int, ...]) -> int:
    """Bytes from the first element to the last one."""
    last = sum((length - 1) * step for length, step in zip(tensor.shape, strides, strict=True))
    return tensor.dtype.itemsize * (1 + last)


def _mapping(path: str) -> mmap.mmap | None:
    """A file in memory, read-only and once for all arrays of it; None if it cannot be."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            key = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            with _lock:
                found = _files.get(key)
                if found is None:
                    found = _files[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    return found
