"""Tensors that Megatron-Core 0.12 to 0.15 stored flattened, back in their own shape.

A distributed optimizer owns ranges of flattened local shards.  Such a shard ``(x, y, z)`` of a tensor
``(X, Y, Z)`` is stored in a tensor of shape ``(X/x, Y/y, Z/z, x*y*z)``, the range along its last axis; the
original shape is in ``mcore_data`` of the index (``dist_checkpointing/strategies/torch.py`` of 0.12 to 0.15).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anyckpt.errors import FormatError
from anyckpt.indexing import Shape
from anyckpt.tensor import LazyTensor, mosaic

_KEY = "nd_reformulated_orig_global_shape"


def original_shape(name: str, mcore_data: Any) -> Shape | None:
    """The shape that a tensor had before it was flattened, or None if it was not.

    Raises:
        FormatError: what the index says is not a shape.
    """
    facts = mcore_data.get(name) if isinstance(mcore_data, dict) else None
    shape = facts.get(_KEY) if isinstance(facts, dict) else None
    if shape is None:
        return None
    if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"{_KEY} is not a shape", tensor=name, found=str(shape)[:100])
    return tuple(shape)


def restore(tensor: LazyTensor, shape: Shape, name: str, chunks: int) -> LazyTensor:
    """The tensor in its original shape.

    Args:
        tensor: as stored, ``[fragments along each axis..., elements of a fragment]``.
        shape: the original one.
        name: for messages.
        chunks: how many stored pieces it has; no piece holds parts of two fragments.

    Raises:
        FormatError: the two shapes do not fit.
    """
    fragments = tensor.shape[:-1]
    fits = len(fragments) == len(shape) and all(f and n % f == 0 for f, n in zip(fragments, shape, strict=True))
    local = tuple(n // f for n, f in zip(shape, fragments, strict=True)) if fits else ()
    if not fits or tensor.shape[-1] != math.prod(local) or math.prod(fragments) > max(chunks, 1):
        raise FormatError(
            "the stored shape is not a flattening of the original one", tensor=name, expected=shape, found=tensor.shape
        )
    if math.prod(fragments) == 1:
        return tensor.reshape(shape)
    starts, tiles = [], []
    for index in np.ndindex(*fragments):
        row = tensor.box((*index, 0), (*(1 for _ in index), tensor.shape[-1]))
        tiles.append(row.reshape((tensor.shape[-1],)).reshape(local))
        starts.append([i * n for i, n in zip(index, local, strict=True)])
    return mosaic(tensor.dtype, shape, starts, tiles)
