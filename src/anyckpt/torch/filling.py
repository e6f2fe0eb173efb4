"""Tensors of torch filled from a checkpoint: in place where their memory is the processor's, by several threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from anyckpt.dtypes import DType, dtype
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.indexing import Shape
from anyckpt.storage.requests import holding
from anyckpt.tensor import LazyTensor

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Target:
    """A tensor to be filled.

    Attributes:
        name: for messages.
        source: what is read, of the target's shape; its elements are cast where the target has another type.
        tensor: what is written.
    """

    name: str
    source: LazyTensor
    tensor: torch.Tensor


def fill(targets: Sequence[Target], *, workers: int | None = None) -> None:
    """Read all sources into their tensors.

    Memory of the processor is read into where it is; of a tensor elsewhere, or of another type, at most a block for
    each thread is held besides.

    Args:
        targets: no two of which share memory.
        workers: threads; as many as processors, up to 8, if None.

    Raises:
        FormatError: bytes are missing or damaged.
        UsageError: a target has another shape than its source.
    """
    for target in targets:
        if tuple(target.tensor.shape) != target.source.shape:
            raise UsageError(
                "has another shape than what is loaded into it",
                tensor=target.name,
                expected=target.source.shape,
                found=tuple(target.tensor.shape),
            )
    blocks = [(target, start, shape) for target in targets for start, shape in _blocks(target.source)]
    count = min(workers or min(8, max(2, os.cpu_count() or 2)), max(1, len(blocks)))
    if count == 1:
        for block in blocks:
            _fill_block(*block)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="anyckpt-load") as pool:
        for done in [pool.submit(_fill_block, *block) for block in blocks]:
            done.result()


def _blocks(tensor: LazyTensor) -> Iterator[tuple[Shape, Shape]]:
    """Boxes (start, shape) of rows, which cover a tensor and are of moderate size."""
    if not tensor.size:
        return
    if not tensor.ndim:
        yield (), ()
        return
    row = max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
    step = max(1, _BLOCK_BYTES // row)
    for first in range(0, tensor.shape[0], step):
        length = min(step, tensor.shape[0] - first)
        yield (first, *(0,) * (tensor.ndim - 1)), (length, *tensor.shape[1:])


def _fill_block(target: Target, start: Shape, shape: Shape) -> None:
    into = target.tensor
    if start:
        into = into.narrow(0, start[0], shape[0])
    box = target.source.box(start, shape)
    memory = _memory(into, box)
    try:
        if memory is not None:
            _read(box, memory)
            return
        staged = torch.empty(shape, dtype=torch_dtype(target.name, box.dtype))
        whole = _memory(staged, box)
        assert whole is not None
        _read(box, whole)
    except AnyckptError as error:
        error.tensor = error.tensor or target.name
        raise
    with torch.no_grad():
        into.copy_(staged)


def _read(box: LazyTensor, memory: Any) -> None:
    with holding(box.needed(0, box.size) if box.is_far else ()):
        box.read_box((0,) * box.ndim, memory)


def _memory(tensor: torch.Tensor, source: LazyTensor) -> Any:
    """The tensor's elements as an array of the source's raw type; None if they are elsewhere, or of another type."""
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    if not plain or tensor.is_conj() or tensor.is_neg() or type(tensor).__torch_dispatch__ is not _DISPATCH:
        return None
    try:
        if dtype(tensor.dtype) != source.dtype:
            return None
    except FormatError:
        return None
    storage = tensor.untyped_storage()
    run = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()
    itemsize = source.dtype.itemsize
    return np.ndarray(
        tuple(tensor.shape),
        source.dtype.raw,
        run,
        tensor.storage_offset() * itemsize,
        tuple(step * itemsize for step in tensor.stride()),
    )


_DISPATCH = torch.Tensor.__torch_dispatch__


def torch_dtype(name: str, dtype: DType) -> torch.dtype:
    """torch's element type.

    Raises:
        UsageError: it has none.
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(
            "torch has no such element type",
            tensor=name,
            found=dtype.name,
            remedy="convert the checkpoint to one with types of torch",
        )
    return found
