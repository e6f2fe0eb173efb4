"""The elements' weighted mean of tensors, computed block by block while it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anyckpt.checkpoint import storage_key
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, UsageError, few
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.storage.gather import scratch
from anyckpt.tensor import LazyTensor, Pointwise, as_numbers, from_array
from anyckpt.tensor.halves import widen

_EQUAL_BYTES = 1 << 20
_BLOCK_ELEMENTS = 1 << 17  # the sum and an operand stay in the processor's cache
_ACCUMULATORS = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float64",
    "float64": "float64",
    "complex64": "complex128",
    "complex128": "complex128",
}
"""What sums are kept in: wider than the elements, so that the mean of equal elements is that element, and is rounded
once.  Types that are missing here are not averaged: whole numbers and truth values count things, and numbers of 8
bits and fewer mean nothing without the scale that is stored beside them."""

Tensors = dict[str, LazyTensor]


_COUNTER = "num_batches_tracked"
"""Batches that a torch BatchNorm has seen: it differs between any two checkpoints, and no output depends on it where
momentum is a number.  Averaging scripts (ESPnet's, NeMo's) add it up rather than divide it, and so does this."""


_VANISHING = 1e-9  # of the weights' sizes: a sum below it is zero but for rounding


def check_shares(shares: Sequence[float]) -> None:
    """Raise UsageError unless a sum that is weighted so can be divided by the weights' own."""
    size = sum(map(abs, shares))
    if not math.isfinite(size) or abs(math.fsum(shares)) <= _VANISHING * size:
        raise UsageError("these weights give no mean", expected="numbers whose sum is not 0", found=shown(shares))


def shown(shares: Sequence[float]) -> str:
    """Weights in a line."""
    return ", ".join(f"{share:g}" for share in shares)


def is_averaged(tensor: LazyTensor) -> bool:
    """Whether a mean is made of such elements."""
    return tensor.dtype.name in _ACCUMULATORS


def means(sources: Sequence[Tensors], shares: Sequence[float], paths: Sequence[str]) -> tuple[Tensors, list[str]]:
    """The means by name, and notes; tensors that are one tensor in every source stay one.

    Raises:
        MappingError: tensors that are not averaged differ.
    """

    def mean(name: str, children: tuple[LazyTensor, ...]) -> LazyTensor:
        return Mean(children, tuple(shares))

    return made_one(sources, mean, paths)


def made_one(
    sources: Sequence[Tensors],
    make: Callable[[str, tuple[LazyTensor, ...]], LazyTensor],
    paths: Sequence[str],
) -> tuple[Tensors, list[str]]:
    """What is made of tensors of a name, by name, and notes; those that are one tensor in every source stay one.

    Args:
        sources: tensors by name, of the same names.
        make: of a name and the tensors of that name, which are numbers that can be computed with.
        paths: of the sources, for messages.

    Raises:
        MappingError: tensors of other types, of which the first source's are taken, differ.
    """
    made: dict[Any, LazyTensor] = {}
    found: Tensors = {}
    counters: list[str] = []
    for name in sources[0]:
        children = tuple(source[name] for source in sources)
        if not is_averaged(children[0]):
            found[name] = children[0]
            if name.rpartition(".")[2] != _COUNTER or children[0].dtype.name != "int64" or children[0].ndim:
                _check_equal(name, children, paths)
                continue
            counts = [int(child.numpy()) for child in children]
            if len(set(counts)) > 1:
                found[name] = from_array(np.array(sum(counts), np.int64))
                counters.append(name)
            continue
        keys = tuple(storage_key(child) for child in children)
        one = None if None in keys else made.get(keys)
        if one is None:
            one = make(name, children)
            if None not in keys:
                made[keys] = one
        found[name] = one
    if not counters:
        return found, []
    return found, [f"counters of batches are added up and not averaged: {few(counters, 1)}"]


def _check_equal(name: str, children: Sequence[LazyTensor], paths: Sequence[str]) -> None:
    for child, path in zip(children[1:], paths[1:], strict=True):
        blocks = zip(children[0].chunks(_EQUAL_BYTES), child.chunks(_EQUAL_BYTES), strict=True)
        if not all(a.tobytes() == b.tobytes() for a, b in blocks):
            raise MappingError(
                f"is {child.dtype.name}, which is not averaged, and differs between the checkpoints",
                path=path,
                tensor=name,
                expected=f"the elements of {paths[0]}",
                found="others",
                remedy="leave it out with --exclude",
            )


class Mean(Pointwise):
    """The weighted mean of tensors of one shape and type, rounded once; holds one operand at a time.

    Args:
        children: the operands, of a type in the table above.
        shares: a weight per operand; the sum is divided by theirs.
    """

    __slots__ = ("_accumulator", "_shares")

    def __init__(self, children: tuple[LazyTensor, ...], shares: tuple[float, ...]) -> None:
        self.children = children
        self.dtype: DType = children[0].dtype
        self.shape = children[0].shape
        self._shares = shares
        self._accumulator = np.dtype(_ACCUMULATORS[self.dtype.name])

    def identity(self) -> Identity:
        return self.children, self._shares

    def _most(self) -> int:
        return _BLOCK_ELEMENTS

    def _compute(self, start: Shape, out: Array) -> None:
        assert self.dtype.numpy is not None
        wide = out.size * self._accumulator.itemsize
        with scratch(out.size * self.dtype.itemsize) as first, scratch(wide) as second, scratch(wide) as third:
            raw = first.view(self.dtype.raw).reshape(out.shape)
            numbers, total = (each.view(self._accumulator).reshape(out.shape) for each in (second, third))
            with np.errstate(all="ignore"):
                for number, (child, share) in enumerate(zip(self.children, self._shares, strict=True)):
                    child.read_box(start, raw)
                    widen(numbers if number else total, as_numbers(raw, self.dtype))
                    if share != 1.0:
                        np.multiply(numbers if number else total, share, out=numbers if number else total)
                    if number:
                        np.add(total, numbers, out=total)
                np.divide(total, math.fsum(self._shares), out=total)
                np.copyto(out.view(self.dtype.numpy), total, casting="unsafe")

    def _of(self, children: Iterator[LazyTensor]) -> LazyTensor:
        return Mean(tuple(children), self._shares)
