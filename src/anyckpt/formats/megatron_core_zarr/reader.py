"""Opening a checkpoint of the zarr backend: reads ``.zarray`` files and sizes, no chunk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from anyckpt.checkpoint import Checkpoint, StoredChecksum
from anyckpt.containers.dcp import DcpContents
from anyckpt.containers.dcp.items import LazyObjects, Unread
from anyckpt.containers.torch_file import read_torch
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.zarr_array import ZARRAY, open_array, read_metadata
from anyckpt.errors import FormatError
from anyckpt.formats.megatron_core.reader import megatron_checkpoint, read_committed
from anyckpt.formats.megatron_core_zarr.location import checkpoint_folder, is_zarr
from anyckpt.storage.folder import Folder
from anyckpt.storage.heads import read_each, whole
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_LOCKS = ".sync"
"""Ends the name of a directory of lock files, which has files called like an array's, all empty."""
_OBJECT = re.compile(r"(?P<name>.+/shard_[\d._]+)\.pt", re.ASCII)
_ATTRIBUTES = (".zattrs", ".zgroup", ".zmetadata")


def read(location: Location) -> Checkpoint:
    """Open a checkpoint, or the newest iteration of a training root.

    Raises:
        FormatError: see :func:`read_zarr`.
    """
    return read_zarr((checkpoint_folder(location) or location).folder(), path=location.path)


def read_payload(folder: Folder, *, path: str) -> Checkpoint:
    """The checkpoint of either backend in ``folder``; of ``torch_dist`` with what says that it was not finished.

    Args:
        folder: where the files are.
        path: what the user opened.

    Raises:
        FormatError: see :func:`read_zarr` and :func:`~anyckpt.formats.megatron_core.reader.read_torch_dist`.
    """
    return read_zarr(folder, path=path) if is_zarr(folder) else read_committed(folder, path=path)


def read_zarr(folder: Folder, *, path: str) -> Checkpoint:
    """The checkpoint in ``folder``, on disk or in an archive.

    Args:
        folder: where the files are.
        path: what the user opened.

    Raises:
        FormatError: an array is compressed, damaged, or lacks a chunk; or the common state is damaged.
    """
    contents = _contents(folder)
    checkpoint = megatron_checkpoint(folder, contents, path=path)
    return replace(
        checkpoint,
        format="megatron-core-zarr",
        format_version="zarr format 2, Megatron-Core 0.15 or older",
        details={**checkpoint.details, "backend": "zarr"},
    )


def _contents(folder: Folder) -> DcpContents:
    """Tensors and objects by the names of their directories and files."""
    names = folder.names()
    arrays = {name.removesuffix(f"/{ZARRAY}") for name in names if name.endswith(f"/{ZARRAY}")}
    arrays = {key for key in arrays if not key.endswith(_LOCKS)}
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, Unread] = {}
    files: dict[str, dict[str, ByteSource]] = {key: {} for key in arrays}
    used: list[str] = []
    for name in names:
        if any(part.endswith(_LOCKS) for part in name.split("/")[:-1]):
            used.append(name)
            continue
        key = _holder(name, arrays)
        if key is not None:
            used.append(name)
            part = name[len(key) + 1 :]
            if part != ZARRAY and part not in _ATTRIBUTES:
                files[key][part] = folder.open(name)
        elif (found := _OBJECT.fullmatch(name)) is not None:
            used.append(name)
            source = folder.open(name)
            objects[found["name"]] = Unread(source, 0, source.size, found["name"], wrapped=False)
    if not arrays:
        raise FormatError(
            "has no zarr arrays",
            path=folder.name,
            expected=f"a directory with {ZARRAY} for each tensor",
            found=", ".join(names[:5]),
            remedy="the save was interrupted, or not all files were copied",
        )
    keys = sorted(arrays)
    left = iter(keys)
    described = read_each(
        lambda source: read_metadata(source, next(left)), (folder.open(f"{key}/{ZARRAY}") for key in keys), whole
    )
    for key, metadata in zip(keys, described, strict=True):
        tensors[key] = open_array(key, metadata, files[key], f"{folder.name}/{key}")
    return DcpContents(
        tensors,
        LazyObjects(objects),
        chunks={key: len(own) for key, own in files.items()},
        shard_files={key: tuple(f"{key}/{part}" for part in own) for key, own in files.items()},
        files=tuple(used),
        checksums=lambda: _checksums(objects),
    )


def _holder(name: str, arrays: set[str]) -> str | None:
    """The array whose directory a file is in."""
    at = name.rfind("/")
    while at > 0:
        if name[:at] in arrays:
            return name[:at]
        at = name.rfind("/", 0, at)
    return None


def _checksums(objects: dict[str, Unread]) -> Iterator[StoredChecksum]:
    return chain.from_iterable(stored_checksums(read_torch(unread.archive())) for unread in objects.values())
