"""Whether chunks cover a tensor exactly once, quickly where they lie on a grid, as nearly all do."""

from __future__ import annotations

import numpy as np

from anyckpt.indexing import Array, Shape, check_cover


def check_exact_cover(shape: Shape, starts: Array, stops: Array) -> None:
    """Raise AnyckptError unless the boxes ``[starts, stops)`` cover ``shape`` exactly once.

    Args:
        shape: the whole.
        starts: first index of each box, ``[boxes, axes]``, int64.
        stops: index past the last, same shape.
    """
    if not is_grid(shape, starts, stops):
        check_cover(shape, starts, stops)


def is_grid(shape: Shape, starts: Array, stops: Array) -> bool:
    """Whether the boxes are all cells of a grid over ``shape``, each once; they then cover it exactly."""
    if len(starts) == 1:  # as of most tensors
        return not starts.any() and tuple(stops[0].tolist()) == shape
    cell = np.zeros(len(starts), dtype=np.int64)
    cells = 1
    for axis, length in enumerate(shape):
        first, column = starts[:, axis], stops[:, axis]
        edges = np.unique(first)
        if edges.size == 0 or edges[0] != 0 or edges[-1] >= length:
            return False
        number = np.searchsorted(edges, first)
        if not np.array_equal(column, np.append(edges[1:], length)[number]):
            return False
        cells *= edges.size
        if cells > len(starts):
            return False
        cell = cell * edges.size + number
    return cells == len(starts) and np.unique(cell).size == cells
