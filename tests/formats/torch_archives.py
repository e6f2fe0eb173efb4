"""Builds small torch files, right ones and wrong ones, without torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from tests.support import file_bytes

from anyckpt.containers.torch_file import zip_parts
from anyckpt.dtypes import dtype
from anyckpt.engine.plan import OutputFile
from anyckpt.pickling import PersistentId, dumps
from anyckpt.pickling import torch_objects as objects
from anyckpt.tensor import from_array

TWELVE = np.arange(12, dtype=np.float32)


def small_file() -> bytes:
    """A whole file with two tensors and a number, as the writer makes it."""
    root = {"a": from_array(TWELVE.reshape(3, 4)), "b": from_array(TWELVE[:2]), "epoch": 3}
    return file_bytes(OutputFile("", zip_parts(root)))


def storage(key: str = "0", count: int = 12, kind: str = "float32", location: str = "cpu") -> PersistentId:
    return objects.storage(dtype(kind), key, count, location=location)


def tensor(offset: Any = 0, shape: Any = (3, 4), stride: Any = (4, 1), *, of: PersistentId | None = None) -> Any:
    """A tensor over the storage ``0`` of twelve float32; sizes and strides are written as they are given."""
    made = objects.tensor(of or storage(), 0, (), (), dtype=dtype("float32"))
    made.args = (made.args[0], offset, shape, stride, *made.args[4:])
    return made


def archive(
    root: Any,
    records: Mapping[str, bytes] | None = None,
    *,
    method: int = zipfile.ZIP_STORED,
    folder: str = "archive",
    pickle: bytes | None = None,
) -> bytes:
    """A zip archive with ``root`` pickled and ``data/0`` of twelve float32; ``records`` adds and replaces."""
    held = {"data.pkl": dumps(root) if pickle is None else pickle, "data/0": TWELVE.tobytes(), "version": b"3\n"}
    held.update(records or {})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in held.items():
            file.writestr(zipfile.ZipInfo(f"{folder}/{name}", (1980, 1, 1, 0, 0, 0)), data, method)
    return out.getvalue()
