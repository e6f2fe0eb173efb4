"""A folder of ``.npy`` files, one tensor each, as ``numpy.save`` writes and ``numpy.load`` reads them."""

from __future__ import annotations

import io
import os

import numpy as np
from numpy.lib import format as npy

from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import BY_NAME
from anyckpt.engine.plan import Literal, OutputFile, Plan, TensorData
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.registry import Format, WriteOptions
from anyckpt.formats.shared.loose_tensors import weights_only
from anyckpt.storage.place import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored

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
    head = io.BytesIO(source.read(0, min(source.size, _LONGEST_HEADER)))
    try:
        version = npy.read_magic(head)
        parse = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, transposed, stored = parse(head)
    except ValueError as error:
        raise FormatError(f"is not a file of numpy.save: {error}", path=source.name) from None
    kind = BY_NAME.get(stored.name)
    if kind is None or stored.byteorder == ">":
        raise FormatError("has an element type that no tensor has", path=source.name, found=stored.str)
    order = tuple(reversed(shape)) if transposed else shape
    tensor = Stored(source, head.tell(), kind, order)
    tensor.check()
    return tensor.transpose() if transposed else tensor


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
