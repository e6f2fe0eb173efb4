"""Codes and scales in another form: the same in every part that is read."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.quantization.carried import PackedRows, Sampled
from anyckpt.tensor import LazyTensor, concatenate, from_array


def halves(array: np.ndarray) -> LazyTensor:  # type: ignore[type-arg]
    """The array of two stored parts."""
    middle = array.shape[0] // 2
    return concatenate([from_array(array[:middle]), from_array(array[middle:])], 0)


@given(st.data())
def test_every_part_is_as_in_the_whole(data: st.DataObject) -> None:
    rows, columns, step = (data.draw(st.integers(1, 9)) for _ in range(3))
    codes = np.random.default_rng(rows).integers(0, 16, (2 * rows, columns), dtype=np.uint8)
    numbers = (codes.astype(np.int8) - 8) & 15
    packed = (numbers[::2] | (numbers[1::2] << 4)).astype(np.int8)
    scales = np.repeat(np.arange(rows * columns, dtype=np.float32).reshape(rows, columns), step, axis=1)
    both = ((PackedRows(halves(codes)), packed), (Sampled(halves(scales), step), scales[:, ::step]))
    for tensor, expected in both:
        assert np.array_equal(tensor.numpy(), expected)
        start = tuple(data.draw(st.integers(0, n - 1)) for n in expected.shape)
        shape = tuple(data.draw(st.integers(1, n - a)) for n, a in zip(expected.shape, start, strict=True))
        part = expected[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        assert np.array_equal(tensor.box(start, shape).numpy(), part)
        assert np.array_equal(np.concatenate([np.array(c) for c in tensor.chunks(3)]), expected.reshape(-1))
