"""Numpy arrays, scalars and dtypes rebuilt from their inert records, from checked bytes only.

The forms are those of numpy 1.x (``numpy.core``) and 2.x (``numpy._core``), protocol 5 without out-of-band
buffers included.  Object arrays, structured types and anything whose bytes do not fit its shape stay records.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from anyckpt.pickling.records import Global, Record

_PLAIN_TYPE = re.compile(r"(b1|[iu][1248]|f[248]|c8|c16|[SU][0-9]{1,6})\Z")
_CORES = ("numpy.core.", "numpy._core.")


def rebuild(record: Record) -> Any:
    """The array, Python scalar or dtype that ``record`` describes; the record itself if it is none of these."""
    core = next((prefix for prefix in _CORES if record.path.startswith(prefix)), "")
    name = record.path.removeprefix(core)
    found: Any = None
    if record.path == "numpy.dtype":
        found = _dtype(record)
    elif core and name == "multiarray.scalar" and len(record.args) == 2:
        found = _scalar(*record.args)
    elif core and name == "multiarray._reconstruct" and isinstance(record.state, tuple):
        # Old numpy writes no version number before the four parts.
        parts = record.state[-4:]
        if len(parts) == 4:
            found = _array(parts[0], parts[1], "F" if parts[2] is True else "C", parts[3])
    elif core and name == "numeric._frombuffer" and len(record.args) == 4:
        data, kind, shape, order = record.args
        found = _array(shape, kind, order, data)
    return record if found is None else found


def _dtype(record: object) -> np.dtype[Any] | None:
    """Only the types of plain numbers and fixed-size strings: no objects, no fields, no aliases."""
    if not isinstance(record, Record) or record.type != Global("numpy", "dtype") or not record.args:
        return None
    text = record.args[0]
    if not isinstance(text, str) or not _PLAIN_TYPE.match(text):
        return None
    order: Any = "<"
    if isinstance(record.state, tuple) and len(record.state) > 1:
        order = record.state[1]
    return np.dtype(text).newbyteorder(order) if order in ("<", ">", "|", "=") else None


def _scalar(kind: object, data: object) -> Any:
    array = _array((), kind, "C", data)
    try:
        return None if array is None else array.item()
    except ValueError:  # four bytes that are no character
        return None


def _array(shape: object, kind: object, order: object, data: object) -> np.ndarray[Any, Any] | None:
    dtype = _dtype(kind)
    if isinstance(data, str):
        # Python 2 bytes that happened to be valid UTF-8 were taken for text.
        data = data.encode("utf-8", "surrogatepass")
    if dtype is None or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
        return None
    if not isinstance(shape, tuple) or len(shape) > 32:
        return None
    if not all(type(extent) is int and 0 <= extent < 1 << 48 for extent in shape):
        return None
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        return None
    if not data:
        largest = math.prod(extent or 1 for extent in shape) * dtype.itemsize
        return np.zeros(shape, dtype) if largest < 1 << 48 else None
    flat = np.frombuffer(bytes(data), dtype)
    return flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if order == "F" else "C")
