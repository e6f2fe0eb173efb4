"""The tar archive that torch before 0.1.10 wrote: members ``sys_info``, ``pickle``, ``storages`` and ``tensors``."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.rebuild import TensorBuilder, storage_dtype
from anyckpt.containers.torch_file.values import MetaTensor, Storage, brief, brief_text
from anyckpt.errors import FormatError
from anyckpt.pickling import load_prefix
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar import looks_like_tar, read_tar
from anyckpt.tensor import LazyTensor

_MEMBERS = ("sys_info", "pickle", "storages", "tensors")
_MOST_AXES = 32


def is_tape(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a tar archive whose first member is one of a torch file's."""
    first = head[:100].rstrip(b"\0").removeprefix(b"./").decode("latin-1")
    return looks_like_tar(head) and first in _MEMBERS


class _Cursor:
    """Reads pickles and numbers one after another."""

    def __init__(self, source: ByteSource, order: str) -> None:
        self.source = source
        self._order = order
        self.at = 0

    def pickle(self) -> Any:
        value, self.at = load_prefix(self.source, self.at, name=self.source.name)
        return value

    def numbers(self, count: int, width: int = 8) -> list[int]:
        data = self.source.read(self.at, count * width)
        self.at += len(data)
        return [int(n) for n in np.frombuffer(data, dtype=f"{self._order}i{width}")]

    def skip(self, nbytes: int) -> ByteSource:
        part = self.source.slice(self.at, nbytes)
        self.at += nbytes
        return part

    def bad(self, problem: str, found: object) -> FormatError:
        return FormatError(problem, path=self.source.name, found=brief(found))

    def count(self) -> int:
        value = self.pickle()
        if type(value) is not int or not 0 <= value <= self.source.size:
            raise self.bad("a number of items is not a count", value)
        return value


def read_tape(source: ByteSource) -> TorchContents:
    """Open a tar archive of torch before 0.1.10.

    Raises:
        FormatError: a member is missing, truncated or damaged.
        UnsafeError: the archive has links or names that climb out.
    """
    members = read_tar(source)
    for name in _MEMBERS[1:]:
        if name not in members:
            raise FormatError("is a tar archive but not a torch file", path=source.name, expected=f"a member {name}")
    system: Any = {}
    if "sys_info" in members:
        system, _ = load_prefix(members["sys_info"].source, 0, name=members["sys_info"].source.name)
    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    order = ">" if big_endian else "<"
    storages = _storages(_Cursor(members["storages"].source, order), big_endian)
    builder = TensorBuilder(source.name)
    tensors = _tensors(_Cursor(members["tensors"].source, order), storages, builder)

    def persistent_load(identifier: Any) -> Any:
        if type(identifier) is tuple and identifier:
            return identifier[0]
        key = identifier
        if type(key) is str and len(key) <= 20 and key.isascii() and key.isdigit():
            key = int(key)
        if _is_key(key) and key in tensors:
            return tensors[key]
        if _is_key(key) and key in storages:
            return storages[key]
        raise FormatError("a reference is to a tensor that is missing", path=source.name, found=brief(identifier))

    pickle = members["pickle"].source
    root, _ = load_prefix(
        pickle, 0, persistent_load=persistent_load, constructors=builder.constructors, name=pickle.name
    )
    return TorchContents(
        root,
        "tar",
        brief(system["protocol_version"]) if isinstance(system, dict) and "protocol_version" in system else None,
        byteorder="big" if big_endian else "little",
        storages={str(key): storage for key, storage in storages.items()},
        facts=builder.facts,
    )


def _storages(cursor: _Cursor, big_endian: bool) -> dict[int, Storage]:
    storages: dict[int, Storage] = {}
    for _ in range(cursor.count()):
        facts = cursor.pickle()
        if type(facts) is not tuple or len(facts) != 3 or not _is_key(facts[0]):
            raise cursor.bad("a storage is described in an unknown way", facts)
        key, location, kind = facts
        dtype = storage_dtype(kind, cursor.source.name)
        (count,) = cursor.numbers(1)
        if count < 0:
            raise cursor.bad("a storage has a negative size", count)
        part = cursor.skip(count * (1 if dtype is None else dtype.itemsize))
        storages[key] = Storage(str(key), part, dtype, count, brief_text(location), big_endian)
    views = cursor.pickle()
    if type(views) is not list:
        raise cursor.bad("the list of views is not a list", views)
    for view in views:
        if type(view) is not tuple or len(view) != 4 or not all(map(_is_key, view)) or view[1] not in storages:
            raise cursor.bad("a view of a storage is described in an unknown way", view)
        key, root_key, offset, count = view
        root = storages[root_key]
        if offset < 0 or not 0 <= count <= root.count - offset:
            raise cursor.bad("a view lies outside its storage", view)
        assert root.source is not None
        width = 1 if root.dtype is None else root.dtype.itemsize
        part = root.source.slice(offset * width, count * width)
        storages[key] = Storage(str(key), part, root.dtype, count, root.location, big_endian)
    return storages


def _tensors(cursor: _Cursor, storages: dict[int, Storage], builder: TensorBuilder) -> dict[int, LazyTensor]:
    tensors: dict[int, LazyTensor] = {}
    for _ in range(cursor.count()):
        facts = cursor.pickle()
        if type(facts) is not tuple or len(facts) != 3 or not _is_key(facts[0]) or not _is_key(facts[1]):
            raise cursor.bad("a tensor is described in an unknown way", facts)
        if facts[1] not in storages:
            raise cursor.bad("a tensor's storage is missing", facts)
        (axes,) = cursor.numbers(1, 4)
        cursor.skip(4)
        if not 0 <= axes <= _MOST_AXES:
            raise cursor.bad("a tensor has an impossible number of axes", axes)
        shape, strides, (offset,) = cursor.numbers(axes), cursor.numbers(axes), cursor.numbers(1)
        tensor = builder.rebuild(storages[facts[1]], offset, shape, strides)
        if not isinstance(tensor, MetaTensor):
            tensors[facts[0]] = tensor
    return tensors


def _is_key(value: Any) -> bool:
    """Whether a value is the address of a tensor or storage, or another number of 64 bits."""
    return type(value) is int and value.bit_length() <= 64
