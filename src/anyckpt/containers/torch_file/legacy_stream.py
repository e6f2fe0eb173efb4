"""The stream that torch 0.1.10 to 1.5 wrote: five pickles, then each storage behind its length.

The storages follow the pickle that refers to them, so that pickle is read twice: once to learn which storages
there are, and, when their lengths have been read and their places are known, again to make the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.rebuild import TensorBuilder, storage_dtype
from anyckpt.containers.torch_file.values import Storage, brief, brief_text
from anyckpt.errors import FormatError
from anyckpt.pickling import load_prefix
from anyckpt.pickling.calls import read_again
from anyckpt.storage.requests import holding
from anyckpt.storage.source import ByteSource

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_REMEDY = "copy the file again from its origin"


def is_stream(head: bytes) -> bool:
    """Whether a file that begins with ``head`` begins with torch's magic number, pickled by any protocol."""
    return _MAGIC.to_bytes(10, "little") in head[:32] or str(_MAGIC).encode() in head[:32]


class _Storages:
    """Persistent ids of the stream: ``("storage", class, key, location, count[, view])`` and ``("module", ...)``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.wanted: dict[str, tuple[Any, ...]] = {}
        self.roots: dict[str, Storage] = {}

    def collect(self, identifier: Any) -> Any:
        """Note which storage is wanted; stands in for it with nothing."""
        return self._resolve(identifier, False)

    def find(self, identifier: Any) -> Any:
        """The storage itself."""
        return self._resolve(identifier, True)

    def _resolve(self, identifier: Any, known: bool) -> Any:
        if type(identifier) is not tuple or not identifier:
            raise self._malformed(identifier)
        if identifier[0] == "module" and len(identifier) == 4:
            return identifier[1]
        if identifier[0] != "storage" or len(identifier) not in (5, 6):
            raise self._malformed(identifier)
        _, kind, key, location, count, *rest = identifier
        if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 62:
            raise self._malformed(identifier)
        dtype = storage_dtype(kind, self._name)
        facts = (dtype, count, brief_text(location))
        first = self.wanted.setdefault(key, facts)
        # empty storages of any type all have the address 0, and so one key
        if first[:2] != facts[:2] and (first[1] or count):
            raise FormatError(f"storage {key!r} is referred to with two sizes", path=self._name, remedy=_REMEDY)
        if not known:
            return None
        root = self.roots[key]
        view = rest[0] if rest else None
        if view is None:
            return root if root.dtype == dtype else replace(root, dtype=dtype)
        if type(view) is not tuple or len(view) != 3:
            raise self._malformed(identifier)
        view_key, offset, length = view
        if type(offset) is not int or type(length) is not int or offset < 0 or not 0 <= length <= count - offset:
            raise FormatError(f"a view of storage {key!r} lies outside it", path=self._name, found=brief(view))
        assert root.source is not None
        width = 1 if dtype is None else dtype.itemsize
        part = root.source.slice(offset * width, length * width)
        return Storage(brief_text(view_key), part, dtype, length, root.location, root.big_endian)

    def _malformed(self, identifier: Any) -> FormatError:
        return FormatError(
            "a reference outside the pickle is not to a storage", path=self._name, found=brief(identifier)
        )


def read_stream(source: ByteSource) -> TorchContents:
    """Open a stream; reads its pickles and, of each storage, the length.

    Raises:
        FormatError: it is truncated, damaged, or of another version.
    """
    name = source.name
    magic, at = load_prefix(source, 0, name=name)
    version, at = load_prefix(source, at, name=name)
    system, at = load_prefix(source, at, name=name)
    if magic != _MAGIC or version != _PROTOCOL or not isinstance(system, dict):
        raise FormatError(
            "unknown version of the torch stream format", path=name, expected=_PROTOCOL, found=brief(version)
        )
    big_endian = system.get("little_endian") is False
    storages = _Storages(name)
    begin = at
    _, at = load_prefix(source, at, persistent_load=storages.collect, name=name)
    keys, at = load_prefix(source, at, name=name)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise FormatError("the list of storages is not a list of names", path=name, remedy=_REMEDY)
    with holding(_lengths(source, at, keys, storages)):
        _find_storages(source, at, keys, storages, big_endian)
    builder = TensorBuilder(name)
    with read_again():
        root, _ = load_prefix(
            source, begin, persistent_load=storages.find, constructors=builder.constructors, name=name
        )
    return TorchContents(
        root,
        "legacy",
        str(version),
        byteorder="big" if big_endian else "little",
        storages=storages.roots,
        facts=builder.facts,
    )


def _lengths(
    source: ByteSource, at: int, keys: list[str], storages: _Storages
) -> Iterator[tuple[ByteSource, int, int]]:
    """Where the length of each storage lies if all are as the pickle says."""
    for key in keys:
        if key not in storages.wanted:
            return
        yield source, at, 8
        at += 8 + _nbytes(storages, key)


def _nbytes(storages: _Storages, key: str) -> int:
    dtype, count, _ = storages.wanted[key]
    return int(count) * (1 if dtype is None else dtype.itemsize)


def _find_storages(source: ByteSource, at: int, keys: list[str], storages: _Storages, big_endian: bool) -> None:
    name = source.name
    for key in keys:
        if key not in storages.wanted or key in storages.roots:
            raise FormatError(
                f"the list of storages names {key[:50]!r}, which is not wanted", path=name, remedy=_REMEDY
            )
        dtype, count, location = storages.wanted[key]
        length = int.from_bytes(source.read(at, 8), "big" if big_endian else "little", signed=True)
        if length != count:
            raise FormatError(
                f"storage {key!r} has another size than the pickle says",
                path=name,
                expected=f"{count} elements",
                found=f"{length} at byte {at}",
                remedy=_REMEDY,
            )
        nbytes = _nbytes(storages, key)
        storages.roots[key] = Storage(key, source.slice(at + 8, nbytes), dtype, count, location, big_endian)
        at += 8 + nbytes
    missing = [key for key in storages.wanted if key not in storages.roots]
    if missing:
        raise FormatError(f"storage {missing[0]!r} is missing", path=name, remedy=_REMEDY)
