"""Opens torch files of all generations, from any source: a file, a member of a tar, an item of a ``.distcp``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from anyckpt.containers.torch_file import script
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.legacy_stream import is_stream, read_stream
from anyckpt.containers.torch_file.legacy_tar import is_tape, read_tape
from anyckpt.containers.torch_file.rebuild import TensorBuilder, storage_dtype
from anyckpt.containers.torch_file.values import Storage, brief, brief_text
from anyckpt.errors import FormatError, LastingError, UnsafeError
from anyckpt.pickling import load
from anyckpt.pickling.calls import current
from anyckpt.storage.heads import edges, read_each
from anyckpt.storage.source import ByteSource, check_not_pointer
from anyckpt.storage.zip import ZipRecord, directory_of, read_zip

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted

_WHOLE = 4 << 20
_HELD = 1 << 20
_HEAD_RECORDS = ("data.pkl", "version", "byteorder", "constants.pkl")
_LARGEST_DEFLATED_PICKLE = 64 << 20
_NEWEST_VERSION = 10


def torch_steps(source: ByteSource) -> Iterator[Sequence[Wanted]]:
    """What ``read_torch`` reads, in rounds: both ends of the file; a zip's directory; then all of its pickles."""
    yield edges(source)
    if not source.read(0, min(4, source.size)).startswith(b"PK\x03\x04"):
        return
    yield [(source, *directory_of(source))]
    records = read_zip(source)
    folder = root_folder(records, source.name)
    found = (records.get(f"{folder}/{name}") for name in _HEAD_RECORDS)
    yield [(record.source, 0, record.source.size) for record in found if record is not None and _is_held(record)]


def _is_held(record: ZipRecord) -> bool:
    return record.source.size <= _HELD


def read_torch(source: ByteSource) -> TorchContents:
    """Open a torch file without reading tensor data; nothing that it names is imported or called.

    Args:
        source: exactly the file's bytes.

    Raises:
        FormatError: not a torch file, truncated or damaged; a tensor outside its storage.
        UnsafeError: it asks for what no checkpoint needs (see ``pickling.load`` and ``read_zip``).
    """
    return read_each(_read, [source], torch_steps)[0]


def read_torch_files(sources: Iterable[ByteSource]) -> list[TorchContents]:
    """Open torch files; of those that are far, all at once.

    Raises:
        FormatError: see ``read_torch``.
        UnsafeError: see there.
    """
    return read_each(_read, sources, torch_steps)


def _read(source: ByteSource) -> TorchContents:
    head = source.read(0, min(512, source.size))
    if not head:
        raise FormatError("is empty", path=source.name, remedy="copy it again from its origin")
    check_not_pointer(head, source.name)
    read = _read_zip if head.startswith(b"PK\x03\x04") else read_stream if is_stream(head) else None
    if read is None and is_tape(head):
        read = read_tape
    if read is not None:
        return read(source)
    raise FormatError(
        "is not a torch file",
        path=source.name,
        expected="a zip archive, a stream that begins with torch's magic number, or a tar archive",
        found=f"bytes {head[:8]!r}" + (" (a bare pickle)" if head[:1] == b"\x80" else ""),
    )


def root_folder(records: dict[str, ZipRecord], name: str) -> str:
    """The folder that holds ``data.pkl``; torch names it after the file, which may have been renamed since.

    Raises:
        FormatError: there is none, or several.
    """
    found = [record.removesuffix("/data.pkl") for record in records if record.endswith("/data.pkl")]
    depth = min((folder.count("/") for folder in found), default=0)
    found = [folder for folder in found if folder.count("/") == depth]
    if len(found) != 1:
        raise FormatError(
            "is a zip archive but not a torch file",
            path=name,
            expected="one record data.pkl in a folder",
            found=", ".join(list(records)[:5]) or "no records",
        )
    return found[0]


class _ZipStorages:
    """Resolves the persistent ids of a zip archive: ``("storage", class, key, location, count)``."""

    def __init__(
        self, records: dict[str, ZipRecord], folder: str, big_endian: bool, name: str, part: str = "data"
    ) -> None:
        self._records = records
        self._folder = f"{folder}/{part}"
        self._big_endian = big_endian
        self._name = name
        self.found: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> Storage:
        if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
            raise FormatError(
                "a reference outside the pickle is not to a storage", path=self._name, found=brief(identifier)
            )
        _, kind, key, location, count = identifier
        if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 62:
            raise FormatError("a reference to a storage is malformed", path=self._name, found=brief(identifier))
        dtype = storage_dtype(kind, self._name)
        known = self.found.get(key)
        if known is not None and (known.dtype, known.count) == (dtype, count):
            return known
        record = self._records.get(f"{self._folder}/{key}")
        source = None if record is None else record.source
        if source is None and location != "meta":
            raise FormatError(
                "a storage is missing",
                path=self._name,
                expected=f"a record {self._folder}/{key[:100]}",
                remedy="copy the file again from its origin",
            )
        storage = Storage(key, source, dtype, count, brief_text(location), self._big_endian)
        if source is not None and source.size != storage.nbytes:
            raise FormatError(
                f"storage {key!r} has another size than the pickle says",
                path=self._name,
                expected=f"{storage.nbytes} bytes",
                found=f"{source.size} bytes",
                remedy="copy the file again from its origin",
            )
        self.found.setdefault(key, storage)
        return storage


def _read_zip(source: ByteSource) -> TorchContents:
    records = read_zip(source)
    folder = root_folder(records, source.name)
    warnings: list[str] = []
    version = _small(records, f"{folder}/version")
    if version is None:
        warnings.append("has no record 'version'; torch.load refuses the file")
    elif not version.isascii() or not version.isdigit() or not 1 <= int(version[:9]) <= _NEWEST_VERSION:
        raise FormatError(
            "unknown version of the torch file format", path=source.name, expected="1 to 10", found=repr(version[:20])
        )
    byteorder = _small(records, f"{folder}/byteorder") or "little"
    if byteorder not in ("little", "big"):
        raise FormatError("unknown byte order", path=source.name, expected="little or big", found=repr(byteorder[:20]))
    if any(record.compressed for record in records.values() if record.name.startswith(f"{folder}/data/")):
        warnings.append("has compressed records; torch.load(mmap=True) reads garbage from such a file")
    pickle = records[f"{folder}/data.pkl"]
    storages = _ZipStorages(records, folder, byteorder == "big", source.name)
    builder = TensorBuilder(source.name)
    root = _unpickled(pickle, storages, builder)
    constants = records.get(f"{folder}/constants.pkl")
    found = storages.found
    if constants is not None:
        script.as_modules(root, script.Declarations(partial(_code, records, folder)))
        own = _ZipStorages(records, folder, byteorder == "big", source.name, "constants")
        script.add_constants(root, _unpickled(constants, own, builder))
        found = {**found, **{f"constants/{key}": storage for key, storage in own.found.items()}}
    _note_others(records, folder)
    return TorchContents(
        root,
        "zip" if constants is None else "torchscript",
        version,
        folder,
        byteorder,
        found,
        tuple(records.values()),
        builder.facts,
        warnings,
    )


def _unpickled(pickle: ZipRecord, storages: _ZipStorages, builder: TensorBuilder) -> Any:
    if pickle.compressed and pickle.source.size > _LARGEST_DEFLATED_PICKLE:
        raise UnsafeError(
            "a compressed pickle is too large",
            path=pickle.source.name,
            expected=f"at most {_LARGEST_DEFLATED_PICKLE} bytes",
            found=pickle.source.size,
        )
    return load(
        pickle.source.read_all() if pickle.source.size <= _WHOLE else pickle.source,
        persistent_load=storages,
        constructors={**builder.constructors, **script.constructors()},
        name=pickle.source.name,
    )


def _note_others(records: dict[str, ZipRecord], folder: str) -> None:
    """Note what pickles ask for that torch itself does not read: whoever put them there has a use for them."""
    wanted = current()
    if wanted is None:
        return
    for name, record in records.items():
        if not name.endswith((".pkl", ".pickle")) or name in (f"{folder}/data.pkl", f"{folder}/constants.pkl"):
            continue
        try:
            if record.source.size > _LARGEST_DEFLATED_PICKLE:
                raise UnsafeError("a pickle is too large to be looked at", path=record.source.name)
            load(record.source.read_all(), persistent_load=lambda _: None, name=record.source.name)
        except LastingError as error:
            wanted.unread[record.source.name] = error.problem


def _code(records: dict[str, ZipRecord], folder: str, name: str) -> ByteSource | None:
    record = records.get(f"{folder}/code/{name}")
    return None if record is None else record.source


def _small(records: dict[str, ZipRecord], name: str) -> str | None:
    record = records.get(name)
    if record is None:
        return None
    return record.source.read_all(limit=64).decode("latin-1").strip()
