"""Bare pickles (``pickle.dump``): of torch tensors, each with a small torch file inside, or of numpy arrays.

Model zoos keep weights so (Detectron2's are numpy arrays).  Runs of bytes stay in the file until they are asked for,
whatever the pickle's size; only numpy's arrays of protocols 0 to 2, which are spelled as text, are held in memory.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import numpy as np

from anyckpt.containers.torch_file.byteorder import SwappedSource
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.reader import read_torch
from anyckpt.containers.torch_file.rebuild import TensorBuilder
from anyckpt.containers.torch_file.values import Storage
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import FormatError
from anyckpt.pickling import Record, load_prefix
from anyckpt.pickling.plain import view
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.tensor import LazyTensor, Stored

_PROTOCOLS = range(2, 6)
_TEXT_PROTOCOLS = (b"(", b"c", b"]", b"}")
_SUFFIXES = (".pkl", ".pickle", ".p")
_ARRAYS = tuple(f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct",))
_BUFFERS = tuple(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core"))
_MOST_AXES = 32


def is_bare(head: bytes, suffix: str) -> bool:
    """Whether a file that begins with ``head`` may be a pickle and nothing else."""
    if head[:1] == b"\x80":
        return len(head) > 2 and head[1] in _PROTOCOLS
    return suffix in _SUFFIXES and head[:1] in _TEXT_PROTOCOLS


def read_bare(source: ByteSource) -> TorchContents:
    """Open a bare pickle that holds tensors or arrays; nothing that it names is imported or called.

    Raises:
        FormatError: it is damaged, or holds none.
    """
    builder = TensorBuilder(source.name)
    storages: dict[str, Storage] = {}
    numbers = count()

    def from_bytes(arguments: tuple[Any, ...]) -> Any:
        """``torch.storage._load_from_bytes(bytes)``: a storage saved by itself."""
        data = arguments[0] if len(arguments) == 1 else None
        if isinstance(data, bytes):
            data = MemorySource(data, source.name)
        if not isinstance(data, ByteSource):
            return NotImplemented
        storage = read_torch(data).root
        if not isinstance(storage, Storage):
            return NotImplemented
        storages[str(next(numbers))] = storage
        return storage

    root, _ = load_prefix(
        source,
        0,
        constructors={**builder.constructors, "torch.storage._load_from_bytes": from_bytes},
        leave=lambda offset, length: source.slice(offset, length),
        name=source.name,
    )
    root, arrays = _with_tensors(root, source.name)
    if not arrays and not builder.facts:
        raise FormatError(
            "is a bare pickle without tensors or arrays",
            path=source.name,
            expected="a file of torch.save, or a pickle of tensors",
        )
    return TorchContents(root, "pickle", storages=storages, facts=builder.facts)


def _with_tensors(root: Any, name: str) -> tuple[Any, int]:
    """The object with a tensor in place of each numpy array in its dictionaries, lists and attributes."""
    made: dict[int, LazyTensor] = {}
    kept: list[Any] = []

    def seen(value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple and any(isinstance(part, Record) for part in value):
            return tuple(map(seen_array, value))
        return seen_array(value)

    def seen_array(value: Any) -> Any:
        if not isinstance(value, Record):
            return value
        if id(value) not in made:
            tensor = _tensor_of(value, name)
            if tensor is None:
                return value
            made[id(value)] = tensor
            kept.append(value)
        return made[id(value)]

    root = seen(root)
    visited: set[int] = set()
    todo = [root]
    while todo:
        here = todo.pop()
        if id(here) in visited:
            continue
        visited.add(id(here))
        if isinstance(here, dict):
            for key, value in here.items():
                here[key] = seen(value)
            todo.extend(here.values())
        elif isinstance(here, list):
            here[:] = map(seen, here)
            todo.extend(here)
        elif isinstance(here, tuple):
            todo.extend(here)
        elif isinstance(here, Record):
            todo.extend(part for part in (here.args, here.state, here.items, here.pairs) if part is not None)
    return root, len(made)


def _tensor_of(record: Record, name: str) -> LazyTensor | None:
    """The array that a record describes, its bytes left where they are; None if it is none that a tensor can be."""
    if record.path in _ARRAYS and isinstance(record.state, tuple) and len(record.state) >= 4:
        shape, kind, fortran, data = record.state[-4:]
    elif record.path in _BUFFERS and len(record.args) == 4:
        data, kind, shape, order = record.args
        fortran = order == "F"
    else:
        return None
    if not isinstance(data, ByteSource):
        array = view(record)
        if not isinstance(array, np.ndarray) or array.dtype.name not in BY_NAME:
            return None
        plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        return Stored(MemorySource(plain, name), 0, BY_NAME[array.dtype.name], array.shape)
    numbers = view(kind)
    if not isinstance(numbers, np.dtype) or numbers.name not in BY_NAME or not _is_shape(shape):
        return None
    dtype = BY_NAME[numbers.name]
    if math.prod(shape) * dtype.itemsize != data.size:
        raise FormatError(
            "an array has another number of bytes than its shape asks for",
            path=data.name,
            expected=f"{math.prod(shape) * dtype.itemsize} bytes for {shape}",
            found=f"{data.size} bytes",
        )
    if numbers.byteorder == ">" and dtype.component_size > 1:
        data = SwappedSource(data, dtype.component_size)
    strides = None
    if fortran is True and len(shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return Stored(data, 0, dtype, shape, strides)


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, tuple) or len(shape) > _MOST_AXES:
        return False
    return all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
