"""Two 4-bit codes of a byte at a time times the scale of their block, by a table of all products."""

from __future__ import annotations

import numpy as np

from anyckpt.indexing import CACHED_ELEMENTS, Array, look_up
from anyckpt.storage.gather import scratch

_WORD = 4
"""Places in a table, of two bytes each, that a word of eight bytes holds."""

_EACH_PLACE = 0x0100_0100_0100_0100
"""Times a byte, this is in the high half of four places."""


def look_up_pairs(table: Array, codes: Array, scales: Array, out: Array) -> None:
    """Fill ``out`` with products of the codes in bytes and of as many scales as there are blocks of these bytes."""
    words = len(codes) // len(scales) // _WORD
    blocks = max(1, CACHED_ELEMENTS // 2 // (words * _WORD))
    pairs = out.view(table.dtype)
    place = np.dtype(np.intp)
    with scratch(2 * blocks * words * _WORD) as first, scratch(8 * blocks * words * _WORD) as second:
        for at in range(0, len(scales), blocks):
            some = scales[at : at + blocks]
            count = len(some) * words * _WORD
            low = at * words * _WORD
            places, wide = first[: 2 * count].view(np.uint16), second[: place.itemsize * count].view(place)
            spread = second[: 2 * count].view(np.uint64).reshape(len(some), -1)
            np.copyto(places, codes[low : low + count])
            np.multiply(some, np.uint64(_EACH_PLACE), out=spread[:, 0], dtype=np.uint64)
            for number in range(1, spread.shape[1]):
                spread[:, number] = spread[:, 0]
            np.bitwise_or(places.view(np.uint64), spread.reshape(-1), out=places.view(np.uint64))
            np.copyto(wide, places)
            look_up(table, wide, pairs[low : low + count])
