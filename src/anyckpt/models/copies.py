"""Tensors that are stored twice: tied weights, and the same weight under two names."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from anyckpt.checkpoint import storage_key
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, held


def drop_copies(tensors: dict[str, LazyTensor], pairs: Iterable[tuple[str, str]], path: str) -> dict[str, str]:
    """Take out tensors that are there under two names; one that is there under the second alone gets the first."""
    dropped: dict[str, str] = {}
    for name, first in pairs:
        copy = tensors.pop(name, None)
        if copy is None:
            continue
        if first not in tensors:
            tensors[first] = copy
            continue
        original = tensors[first]
        if not is_equal(copy, original):
            raise MappingError(
                f"differs from {first}, though it is the same tensor in every model of the family",
                path=path,
                tensor=name,
                expected=f"{original.dtype.name} {original.shape} with equal values",
                found=f"{copy.dtype.name} {copy.shape}",
                remedy="--exclude the one that is wrong",
            )
        dropped[name] = f"the same tensor as {first}"
    return dropped


def check_tied(name: str, tensor: LazyTensor, other: LazyTensor, path: str | None) -> None:
    """Raise MappingError unless an output layer is the embedding."""
    if is_equal(tensor, other):
        return
    raise MappingError(
        "differs from the embedding although the configuration ties them",
        path=path,
        tensor=name,
        expected=f"{other.dtype.name} {other.shape} with equal values",
        found=f"{tensor.dtype.name} {tensor.shape}",
        remedy="if the model is untied, give a configuration that says so with --config, else --exclude the tensor",
    )


def is_equal(tensor: LazyTensor, other: LazyTensor) -> bool:
    """Compare a few rows: enough to notice a tie that the configuration claims and the weights do not have."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype or not tensor.ndim:
        return False
    key = storage_key(tensor)
    if (key is not None and key == storage_key(other)) or not tensor.size:
        return True
    rows = [(tensor[row], other[row]) for row in sorted({0, tensor.shape[0] // 2, tensor.shape[0] - 1})]
    with held(one for pair in rows for one in pair):
        return all(_same(*pair) for pair in rows)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    first = np.empty(one.shape, one.dtype.raw)
    second = np.empty(other.shape, other.dtype.raw)
    one.read_box((0,) * one.ndim, first)
    other.read_box((0,) * other.ndim, second)
    return first.tobytes() == second.tobytes()
