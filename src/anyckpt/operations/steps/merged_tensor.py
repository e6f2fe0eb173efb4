"""The lazy tensor that several models' tensors of one name are merged to, computed block by block while it is read."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from anyckpt.dtypes import DType
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.operations.steps.merge_rules import Rule
from anyckpt.storage.gather import scratch
from anyckpt.tensor import Combined, LazyTensor, as_numbers
from anyckpt.tensor.halves import widen

_BLOCK_ELEMENTS = 1 << 17  # what is computed stays in the processor's cache


def is_complex(dtype: DType) -> bool:
    """Whether elements are complex numbers."""
    return dtype.name.startswith("complex")


class Merged(Combined):
    """What a rule makes of tensors of one shape, rounded once.

    Numbers of 16 bits are computed with in float32, and others, also where there are only some, in float64 or
    complex128.

    Args:
        children: floating-point tensors, one for each model.
        rule: what is made of their elements.
        dtype: the type that is rounded to.
    """

    __slots__ = ("_wide", "rule")

    def __init__(self, children: tuple[LazyTensor, ...], rule: Rule, dtype: DType) -> None:
        self.children = children
        self.rule = rule
        self.dtype = dtype
        self.shape = children[0].shape
        narrow = all(child.dtype.itemsize == 2 for child in children)
        complex_ones = any(is_complex(child.dtype) for child in children)
        self._wide = np.dtype(np.complex128 if complex_ones else np.float32 if narrow else np.float64)

    def identity(self) -> Identity:
        return self.children, self.rule, self.dtype

    def _most(self) -> int:
        return _BLOCK_ELEMENTS

    def _compute(self, start: Shape, out: Array) -> None:
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
            widen(wide, as_numbers(raw, child.dtype))
        return wide
