"""The lazy tensor that several models' tensors of one name are merged to, computed block by block while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.operations.steps.merge_rules import Rule
from anyckpt.storage.gather import Hole, hole, scratch
from anyckpt.tensor import LazyTensor, Stored, as_numbers

_BLOCK_ELEMENTS = 1 << 17  # what is computed stays in the processor's cache


class Merged(LazyTensor):
    """What a rule makes of tensors of one shape, rounded once.

    Numbers of 16 bits are computed with in float32, and others, also where there are only some, in float64.

    Args:
        children: floating-point tensors, one for each model.
        rule: what is made of their elements.
        dtype: the type that is rounded to.
    """

    __slots__ = ("_wide", "children", "rule")

    def __init__(self, children: tuple[LazyTensor, ...], rule: Rule, dtype: DType) -> None:
        self.children = children
        self.rule = rule
        self.dtype = dtype
        self.shape = children[0].shape
        self._wide = np.dtype(np.float32 if all(child.dtype.itemsize == 2 for child in children) else np.float64)

    def identity(self) -> Identity:
        return self.children, self.rule, self.dtype

    def pieces(self) -> Iterator[Stored]:
        for child in self.children:
            yield from child.pieces()

    def read_box(self, start: Shape, out: Array) -> None:
        if out.size == 0:
            return
        if isinstance(out, Hole):
            for child in self.children:
                child.read_box(start, hole(out.shape, child.dtype.raw))
            return
        if out.size > _BLOCK_ELEMENTS and out.ndim:
            axis = next(a for a, n in enumerate(out.shape) if n > 1)
            step = max(1, out.shape[axis] * _BLOCK_ELEMENTS // out.size)
            for at in range(0, out.shape[axis], step):
                where = (slice(None),) * axis + (slice(at, at + step),)
                self.read_box((*start[:axis], start[axis] + at, *start[axis + 1 :]), out[where])
            return
        assert self.dtype.numpy is not None
        with ExitStack() as buffers, np.errstate(all="ignore"):
            arrays = [self._numbers(child, start, out.shape, buffers) for child in self.children]
            result = self.rule(arrays, start, self.shape)
            np.copyto(out.view(self.dtype.numpy), result, casting="unsafe")

    def _numbers(self, child: LazyTensor, start: Shape, shape: Shape, buffers: ExitStack) -> Array:
        size = int(np.prod(shape, dtype=np.int64))
        wide: Array = buffers.enter_context(scratch(size * self._wide.itemsize)).view(self._wide).reshape(shape)
        with scratch(size * child.dtype.itemsize) as buffer:
            raw = buffer.view(child.dtype.raw).reshape(shape)
            child.read_box(start, raw)
            np.copyto(wide, as_numbers(raw, child.dtype))
        return wide
