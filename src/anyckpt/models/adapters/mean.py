"""The mean of adapters: that of their updates, which no mean of their factors is.

``sum(w * scale * B @ A)`` is one update whose factors are the adapters' one after the other, so the mean is exact, at
a rank that is the sum of theirs; a mean of factors would have products of one adapter's B with another's A in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from anyckpt.dtypes import dtype
from anyckpt.errors import UsageError
from anyckpt.indexing import Array
from anyckpt.models.adapters.adapter import LowRank
from anyckpt.tensor import LazyTensor, Mapped, concatenate


def mean_update(updates: Sequence[tuple[LowRank, float]]) -> LowRank:
    """One update that is a weighted sum of updates of one module; its scale is the largest summand's, which so keeps
    its numbers.

    Args:
        updates: each with its weight.

    Raises:
        UsageError: one is DoRA's, which is no sum.
    """
    name = (updates[0][0].names or ("",))[0]
    if any(update.magnitude is not None for update, _ in updates):
        raise UsageError(
            "DoRA scales rows to a length, and such updates have no mean",
            tensor=name,
            remedy="add each to its base with anyckpt merge-lora, and average the models",
        )
    factors = [update.scale * weight for update, weight in updates]
    common = largest(factors)
    downs = _of_one_type([update.down for update, _ in updates])
    ups = _of_one_type([update.up for update, _ in updates])
    scaled = [_scaled(up, factor / common) for up, factor in zip(ups, factors, strict=True)]
    biases = [(u.bias, factor / common) for (u, _), factor in zip(updates, factors, strict=True) if u.bias is not None]
    bias = None
    if biases:
        parts = _of_one_type([part for part, _ in biases])
        bias = Mapped(tuple(parts), parts[0].dtype, _sum(tuple(factor for _, factor in biases)))
    return LowRank(
        concatenate(downs, 0),
        concatenate(scaled, 1),
        common,
        bias=bias,
        names=tuple(name for update, _ in updates for name in update.names),
    )


def largest(factors: Iterable[float]) -> float:
    """The largest size of a factor; 1 if all are zero."""
    return max(map(abs, factors), default=0.0) or 1.0


def _of_one_type(tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Tensors as they are if they are of one type, else in the narrowest that has all their numbers."""
    kinds = {tensor.dtype.name for tensor in tensors}
    if len(kinds) == 1:
        return list(tensors)
    widest = dtype("float64" if "float64" in kinds else "float32")
    return [tensor.cast(widest) for tensor in tensors]


def _scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor if factor == 1 else Mapped((tensor,), tensor.dtype, _sum((factor,)))


@lru_cache
def _sum(factors: tuple[float, ...]) -> Callable[..., Array]:
    def add(*arrays: Array) -> Array:
        products = (array.astype(np.float64) * factor for array, factor in zip(arrays, factors, strict=True))
        total: Array = sum(products, np.zeros((), np.float64))
        return total.astype(arrays[0].dtype)

    return add
