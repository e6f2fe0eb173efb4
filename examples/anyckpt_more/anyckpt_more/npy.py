"""A folder of ``.npy`` files, one tensor each, as ``numpy.save`` writes and ``numpy.load`` reads them."""

from __future__ import annotations

import io
import os

import numpy as np
from numpy.lib import format as npy

from anyckpt import FormatError, UsageError
from anyckpt.extend import (
    ByteSource,
    Checkpoint,
    DType,
    Format,
    LazyTensor,
    Literal,
    Location,
    OutputFile,
    Plan,
    Stored,
    TensorData,
    WriteOptions,
    dtype,
    weights_only,
)

_LONGEST_HEADER = 1 << 16


def detect(location: Location) -> bool:
    """Whether a directory holds nothing but arrays; what begins with a dot is anyckpt's or the system's."""
    names = [name for name in location.names if not name.startswith(".")]
    return location.is_directory and bool(names) and all(name.endswith(".npy") for name in names)


def read(location: Location) -> Checkpoint:
    """Every array by its file's name: the headers are read, and no elements.

    Raises:
        FormatError: a file is none of numpy's, is truncated, or holds what no tensor does.
    """
    names = [name for name in location.names if name.endswith(".npy")]
    tensors = {name.removesuffix(".npy"): _tensor(location.open(name)) for name in names}
    return Checkpoint(location.path, "npy", tensors)


def _tensor(source: ByteSource) -> LazyTensor:
    head = io.BytesIO(_start(source))
    try:
        version = npy.read_magic(head)
        parse = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, transposed, stored = parse(head)
    except Exception as error:  # whatever the text of a header makes numpy's parser do
        raise FormatError(f"is not a file of numpy.save: {error}", path=source.name) from None
    if any(n < 0 for n in shape):
        raise FormatError("has a shape that no tensor has", path=source.name, found=shape)
    order = tuple(reversed(shape)) if transposed else shape
    tensor = Stored(source, head.tell(), _kind(stored, source), order)
    tensor.check()
    return tensor.transpose() if transposed else tensor


def _kind(stored: np.dtype, source: ByteSource) -> DType:
    try:
        kind = dtype(stored)
    except FormatError:
        kind = None
    if kind is None or stored.byteorder == ">":
        raise FormatError("has an element type that no tensor has", path=source.name, found=stored.str)
    return kind


def _start(source: ByteSource) -> bytes:
    """The header, and nothing of the elements but a byte or two."""
    first = source.read(0, min(source.size, 12))
    length = int.from_bytes(first[8:10] if first[6:7] == b"\1" else first[8:12], "little")
    return source.read(0, min(source.size, 12 + length, _LONGEST_HEADER))


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """A file for each weight; nothing is read but what the names and shapes say.

    Raises:
        UsageError: numpy has no such element type, or a name is no file's.
    """
    weights, ignored = weights_only(checkpoint)
    files = []
    for name, tensor in weights.items():
        if os.path.basename(name) != name or name.startswith("."):
            raise UsageError("its name cannot be a file's", path=checkpoint.path, tensor=name)
        parts = (Literal(_header(name, tensor)), TensorData(name, tensor))
        files.append(OutputFile(f"{name}.npy", parts))
    return Plan("npy", tuple(files), ignored=ignored)


def _header(name: str, tensor: LazyTensor) -> bytes:
    if tensor.dtype.numpy is None or np.dtype(tensor.dtype.numpy).kind == "V":
        raise UsageError(f"numpy has no {tensor.dtype.name}", tensor=name, remedy="cast with --dtype fp32")
    header = io.BytesIO()
    descr = np.dtype(tensor.dtype.numpy).str
    npy.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": tensor.shape})
    return header.getvalue()


FORMAT = Format(name="npy", title="folder of numpy files", detect=detect, read=read, plan=plan)
