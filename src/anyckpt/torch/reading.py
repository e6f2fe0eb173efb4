"""Reading boxes of stored tensors into live ones: where these are, or through memory of the host."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.indexing import Array
from anyckpt.storage.requests import at_once, holding
from anyckpt.tensor import LazyTensor
from anyckpt.torch.live import LivePiece
from anyckpt.torch.memory import bytes_of, in_order

_READ_BYTES = 16 << 20

Task = Callable[[], None]


@dataclass(frozen=True)
class Target:
    """A live tensor to be filled.

    Attributes:
        name: for messages.
        source: what is read, of the tensor's shape; its elements are cast where the tensor has another type.
        tensor: what is written.
    """

    name: str
    source: LazyTensor
    tensor: torch.Tensor


def fill(targets: Sequence[Target], *, workers: int | None = None) -> None:
    """Read all sources into their tensors.

    Args:
        targets: no two of which share memory.
        workers: threads; as many as processors, up to 8, if None.

    Raises:
        FormatError: bytes are missing or damaged.
        UsageError: a target has another shape than its source or no memory of its own, or elements cannot be cast to
            its type.
    """
    tasks: list[Task] = []
    for one in targets:
        if tuple(one.tensor.shape) != one.source.shape:
            raise UsageError(
                "has another shape than what is loaded into it",
                tensor=one.name,
                expected=one.source.shape,
                found=tuple(one.tensor.shape),
            )
        check_fillable(one.name, one.tensor)
        tasks += _into(one.tensor, one.source.cast(dtype(one.tensor.dtype)), one.name)
    at_once(tasks, workers or min(8, max(2, os.cpu_count() or 2)))


def filling(piece: LivePiece, tensor: LazyTensor, name: str) -> list[Task]:
    """What fills a piece, in parts that threads can share.

    Args:
        piece: a box of a live tensor.
        tensor: the whole tensor, as the checkpoint has it.
        name: what the checkpoint calls it, for messages.
    """
    if tensor.shape != piece.shape:
        return [lambda: _fill_overlap(piece, tensor, name)]
    return list(_into(piece.tensor, tensor.box(piece.offset, piece.sizes), name))


def torch_dtype(name: str, kind: DType) -> torch.dtype:
    """torch's element type.

    Raises:
        UsageError: it has none.
    """
    found = getattr(torch, kind.name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(
            "torch has no such element type",
            tensor=name,
            found=kind.name,
            remedy="convert the checkpoint to one with types of torch",
        )
    return found


def _into(target: torch.Tensor, box: LazyTensor, name: str) -> Iterator[Task]:
    """What fills a tensor with a box of its shape and type."""
    if not box.size:
        return
    if target.device.type != "cpu":
        yield lambda: _fill_through(target, box, name)
        return
    if not target.is_contiguous():
        rows = max(1, _READ_BYTES // (box.nbytes // box.shape[0]))
        for start in range(0, box.shape[0], rows):
            length = min(rows, box.shape[0] - start)
            yield _filling_strided(target.narrow(0, start, length), box.narrow(0, start, length), name)
        return
    step = max(1, _READ_BYTES // box.dtype.itemsize)
    out = elements_of(target, box)
    for start in range(0, box.size, step):
        yield _filling(box, start, out[start : start + step], name)


def _filling(box: LazyTensor, start: int, out: Array, name: str) -> Task:
    def task() -> None:
        with _naming(name):
            box.fill(start, out)

    return task


def _filling_strided(target: torch.Tensor, box: LazyTensor, name: str) -> Task:
    """Fill what does not lie in C order where it is."""

    def task() -> None:
        storage, itemsize = target.untyped_storage(), box.dtype.itemsize
        memory = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()
        strides = tuple(step * itemsize for step in target.stride())
        out: Array = np.ndarray(box.shape, box.dtype.raw, memory, target.storage_offset() * itemsize, strides)
        with _naming(name), holding(box.needed(0, box.size) if box.is_far else ()):
            box.read_box((0,) * box.ndim, out)

    return task


def _fill_through(target: torch.Tensor, box: LazyTensor, name: str) -> None:
    """Fill what is on a device by memory of the host: pinned where that helps."""
    step = max(1, _READ_BYTES // box.dtype.itemsize)
    staged = torch.empty(min(box.size, step), dtype=target.dtype, pin_memory=target.is_cuda)
    out = elements_of(staged, box)
    flat = (
        in_order(target) if target.is_contiguous() else torch.empty(box.size, dtype=target.dtype, device=target.device)
    )
    with _naming(name):
        for start in range(0, box.size, step):
            part = min(step, box.size - start)
            box.fill(start, out[:part])
            flat[start : start + part].copy_(staged[:part])
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def _fill_overlap(piece: LivePiece, tensor: LazyTensor, name: str) -> None:
    """Fill a piece of a tensor of other lengths as far as both reach, with zeros elsewhere."""
    ends = [
        min(begin + length, stored)
        for begin, length, stored in zip(piece.offset, piece.sizes, tensor.shape, strict=True)
    ]
    lengths = tuple(max(0, end - begin) for begin, end in zip(piece.offset, ends, strict=True))
    piece.tensor.zero_()
    if math.prod(lengths):
        inside = piece.tensor
        for axis, length in enumerate(lengths):
            inside = inside.narrow(axis, 0, length)
        for task in _into(inside, tensor.box(piece.offset, lengths), name):
            task()


def elements_of(tensor: torch.Tensor, like: LazyTensor) -> Array:
    """The elements of a tensor in C order as one axis of raw numbers, in its own memory."""
    array: Array = bytes_of(tensor.detach()).numpy().view(like.dtype.raw)
    return array


class _naming:  # noqa: N801 - a context manager
    """Errors say which tensor they are about."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, AnyckptError):
            error.tensor = error.tensor or self._name


def check_fillable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose elements have no memory of their own, as ``expand`` and a lazy conjugate have none.

    Raises:
        UsageError: it is one.
    """
    if any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)):
        raise UsageError(
            "cannot be filled: several of its elements are one in memory",
            tensor=name,
            found=f"shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}",
            remedy="give tensor.contiguous()",
        )
    if tensor.is_conj() or tensor.is_neg():
        raise UsageError(
            "cannot be filled: it is a lazy conjugate or negative of what is in memory",
            tensor=name,
            remedy="give tensor.resolve_conj().resolve_neg()",
        )
