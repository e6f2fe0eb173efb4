"""Reading boxes of stored tensors into live ones: where these are, or through memory of the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from anyckpt.errors import AnyckptError
from anyckpt.indexing import Array
from anyckpt.storage.read_count import ReadCount, counting
from anyckpt.tensor import LazyTensor
from anyckpt.torch.live import LivePiece

_READ_BYTES = 16 << 20


def filling(piece: LivePiece, tensor: LazyTensor, name: str, count: ReadCount) -> list[Callable[[], None]]:
    """What fills a piece, in parts that threads can share.

    Args:
        piece: a box of a live tensor.
        tensor: the whole tensor, as the checkpoint has it.
        name: what the checkpoint calls it, for messages.
        count: counts the bytes that are read.
    """
    return [_counted(task, count) for task in _tasks(piece, tensor, name)]


def _tasks(piece: LivePiece, tensor: LazyTensor, name: str) -> Iterator[Callable[[], None]]:
    if not piece.tensor.numel():
        return
    if tensor.shape != piece.shape:
        yield lambda: _fill_overlap(piece, tensor, name)
        return
    box = tensor.box(piece.offset, piece.sizes)
    step = max(1, _READ_BYTES // piece.dtype.itemsize)
    if piece.tensor.device.type != "cpu" or not piece.tensor.is_contiguous():
        yield lambda: _fill_through(piece.tensor, box, name)
        return
    out = elements_of(piece.tensor, box)
    for start in range(0, box.size, step):
        yield _filling(box, start, out[start : start + step], name)


def _filling(box: LazyTensor, start: int, out: Array, name: str) -> Callable[[], None]:
    def task() -> None:
        with _naming(name):
            box.fill(start, out)

    return task


def _fill_through(target: torch.Tensor, box: LazyTensor, name: str) -> None:
    """Fill what is on a device, or does not lie in C order, by memory of the host: pinned where that helps."""
    step = max(1, _READ_BYTES // box.dtype.itemsize)
    staged = torch.empty(min(box.size, step), dtype=target.dtype, pin_memory=target.is_cuda)
    out = elements_of(staged, box)
    flat = (
        target.view(-1) if target.is_contiguous() else torch.empty(box.size, dtype=target.dtype, device=target.device)
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
        _fill_through(inside, tensor.box(piece.offset, lengths), name)


def elements_of(tensor: torch.Tensor, like: LazyTensor) -> Array:
    """The elements of a tensor in C order as one axis of raw numbers, in its own memory."""
    array: Array = tensor.detach().view(-1).view(torch.uint8).numpy().view(like.dtype.raw)
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


def _counted(task: Callable[[], None], count: ReadCount) -> Callable[[], None]:
    def counted() -> None:
        with counting(count):
            task()

    return counted
