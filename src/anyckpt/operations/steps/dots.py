"""Sums over numbers of float64 in the processor's cache, in this thread alone."""

from __future__ import annotations

import numpy as np

from anyckpt.indexing import Array

_RUN = 8192
"""BLAS starts threads of its own for a product of more than 10,000 numbers."""


def dot(a: Array, b: Array) -> float:
    """The sum of products of two one-dimensional arrays of float64."""
    whole = len(a) // _RUN * _RUN
    rest = float(np.dot(a[whole:], b[whole:]))
    if not whole:
        return rest
    runs = np.matmul(a[:whole].reshape(-1, 1, _RUN), b[:whole].reshape(-1, _RUN, 1))
    return float(runs.sum()) + rest


def total(values: Array) -> float:
    """Their sum."""
    return float(np.einsum("i->", values))
