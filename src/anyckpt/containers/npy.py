"""NumPy's ``.npy``: a magic, a version, a header that says type, order and shape, then the elements.

Facts: NumPy 2.x (``numpy.lib.format``; versions 1.0 to 3.0).  Types of ml_dtypes are written as bytes without a
meaning, of which only those of two bytes can be nothing but bfloat16.
"""

from __future__ import annotations

import ast
import math
import struct
from typing import Any

import numpy as np

from anyckpt.containers.torch_file.byteorder import SwappedSource
from anyckpt.dtypes import DType, dtype, from_numpy
from anyckpt.errors import FormatError, UsageError
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Stored

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 10_000
"""Bytes of a header that NumPy itself reads from what it does not trust."""

_ALIGNMENT = 64
_AXES_LIMIT = 32
_WITHOUT_MEANING = {"|V2": "bfloat16", "<V2": "bfloat16"}


class OtherArrayError(FormatError):
    """An array that is none of numbers: of texts, objects, dates or records."""


def read_npy(source: ByteSource) -> LazyTensor:
    """The array of a ``.npy`` file or member.

    Raises:
        OtherArrayError: its elements are no numbers.
        FormatError: it is damaged.
    """
    head = source.read(0, min(12, source.size))
    if not head.startswith(MAGIC) or len(head) < 12 or head[6] not in (1, 2, 3):
        raise _damaged(source, "is no array of NumPy", found=repr(head[:8]))
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    if length > HEADER_LIMIT or start + length > source.size:
        raise _damaged(source, "has a header of impossible length", found=length)
    described, in_columns, shape = _header(source, source.read(start, length))
    kind, swapped = _element_type(source, described)
    size = math.prod(shape) * kind.itemsize
    if size != source.size - start - length:
        raise _damaged(
            source,
            "has other bytes than its shape asks for",
            expected=f"{size} bytes for {described} {shape}",
            found=source.size - start - length,
        )
    offset = start + length
    if swapped:
        source = SwappedSource(source, kind.component_size)
        if offset % kind.component_size:
            raise _damaged(source, "has numbers in reverse order that are not aligned", found=f"they begin at {offset}")
    if in_columns and len(shape) > 1:
        return Stored(source, offset, kind, shape[::-1]).permute(range(len(shape) - 1, -1, -1))
    return Stored(source, offset, kind, shape)


def _header(source: ByteSource, text: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Type, whether columns come first, and shape."""
    try:
        found: Any = ast.literal_eval(text.decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise _damaged(source, "has a header that NumPy does not write", found=repr(text[:80]))
    described, in_columns, shape = found["descr"], found["fortran_order"], found["shape"]
    if not isinstance(described, str):
        raise OtherArrayError("is an array of records, which are no tensor", path=source.name)
    if (
        not isinstance(in_columns, bool)
        or not isinstance(shape, tuple)
        or len(shape) > _AXES_LIMIT
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
    ):
        raise _damaged(source, "has an impossible shape", found=repr(shape)[:80])
    return described, in_columns, shape


def _element_type(source: ByteSource, described: str) -> tuple[DType, bool]:
    """The type, and whether its bytes are in reverse order."""
    if described in _WITHOUT_MEANING:
        return dtype(_WITHOUT_MEANING[described]), False
    try:
        kind = np.dtype(described)
        return from_numpy(kind), kind.byteorder == ">"
    except (TypeError, ValueError, SyntaxError, FormatError):
        raise OtherArrayError(
            "is an array of elements that are no numbers here", path=source.name, found=described[:40]
        ) from None


def npy_head(tensor: LazyTensor, name: str) -> bytes:
    """What precedes the elements of a tensor in C order, as ``numpy.save`` writes it.

    Raises:
        UsageError: NumPy has no such type.
    """
    kind = tensor.dtype.numpy
    if kind is None or kind.kind not in "biufc":
        raise UsageError(
            "NumPy has no such type",
            tensor=name,
            found=tensor.dtype.name,
            remedy="choose one that it has, with --dtype fp32 or fp16, or write safetensors",
        )
    shape = ", ".join(map(str, tensor.shape)) + ("," if tensor.ndim == 1 else "")
    text = f"{{'descr': '{kind.str}', 'fortran_order': False, 'shape': ({shape}), }}"
    length = -(-(10 + len(text) + 1) // _ALIGNMENT) * _ALIGNMENT - 10
    return MAGIC + b"\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1).encode() + b"\n"


def _damaged(source: ByteSource, problem: str, **facts: Any) -> FormatError:
    return FormatError(problem, path=source.name, remedy="copy it again from its origin", **facts)
