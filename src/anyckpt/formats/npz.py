"""The format ``npz``: NumPy's archive of arrays, which JAX, MLX and older TensorFlow code keep weights in.

Facts: NumPy 2.x (``numpy.savez``, ``savez_compressed``): a zip file whose members are ``NAME.npy``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from anyckpt.checkpoint import Checkpoint, StoredChecksum
from anyckpt.containers.npy import MAGIC, OtherArrayError, npy_head, read_npy
from anyckpt.containers.torch_file.layout import Record, zip_layout
from anyckpt.engine.plan import OutputFile, Plan, TensorData
from anyckpt.errors import FormatError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.loose_tensors import told_of_parts, weights_only, without_configuration
from anyckpt.storage.heads import EDGE
from anyckpt.storage.location import Location
from anyckpt.storage.requests import holding
from anyckpt.storage.zip import ZipRecord, read_zip

_SUFFIX = ".npy"
_LOCAL_HEADER = 30
_ALIGNMENT = 64


def _detect(location: Location) -> bool:
    head = location.head
    if location.is_directory or not head.startswith(b"PK\x03\x04"):
        return False
    length, extra = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
    begin = _LOCAL_HEADER + length + extra
    name = head[_LOCAL_HEADER : _LOCAL_HEADER + length]
    compressed = head[8:10] != b"\0\0"
    return name.endswith(_SUFFIX.encode()) and (compressed or head[begin : begin + len(MAGIC)] == MAGIC)


def _read(location: Location) -> Checkpoint:
    records = read_zip(location.open())
    tensors, ignored = {}, {}
    arrays = {name: record for name, record in records.items() if name.endswith(_SUFFIX)}
    with holding((record.source, 0, min(EDGE, record.source.size)) for record in arrays.values()):
        for name, record in arrays.items():
            try:
                tensors[name.removesuffix(_SUFFIX)] = read_npy(record.source)
            except OtherArrayError as error:
                ignored[name.removesuffix(_SUFFIX)] = error.problem
    if not tensors:
        raise FormatError("holds no array of numbers", path=location.path, found=", ".join(list(records)[:5]))
    ignored |= {name: "no array of NumPy" for name in records if name not in arrays}
    compressed = any(record.compressed for record in arrays.values())
    return Checkpoint(
        location.path,
        FORMAT.name,
        tensors,
        ignored=ignored,
        details={"compressed": True} if compressed else {},
        checksums=lambda: _checksums(records),
    )


def _checksums(records: Mapping[str, ZipRecord]) -> Iterator[StoredChecksum]:
    for record in records.values():
        if record.crc or not record.source.size:
            yield StoredChecksum(record.source.name, record.source, record.crc)


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    weights, ignored = weights_only(checkpoint)
    records = [
        Record(name + _SUFFIX, TensorData(name, tensor), _ALIGNMENT, npy_head(tensor, name))
        for name, tensor in weights.items()
    ]
    notes = (*without_configuration(checkpoint), *told_of_parts(checkpoint))
    return Plan(FORMAT.name, (OutputFile("", zip_layout(records, None, 0)),), ignored=ignored, notes=notes)


FORMAT = Format(
    name="npz",
    title="NumPy archive",
    detect=_detect,
    read=_read,
    plan=_plan,
    suffixes=(".npz",),
)
