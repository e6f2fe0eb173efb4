"""float16 in wider types, against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from anyckpt.tensor import from_array
from anyckpt.tensor.halves import widen

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("kind", ["float32", "float64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "int32"])
def test_every_number_is_the_one_that_numpy_makes(kind: object) -> None:
    """Each beside finite ones and beside others, denormal numbers, -0 and NaN of every sort among them."""
    finite = EVERY[np.isfinite(EVERY)]
    for numbers in (EVERY, finite, EVERY[::-1], finite.reshape(2, -1).T, EVERY[:0], EVERY[7]):
        found = np.empty(np.shape(numbers), kind)
        with np.errstate(all="ignore"):
            widen(found, np.asarray(numbers))
            wanted = np.asarray(numbers).astype(kind)
        assert found.tobytes() == wanted.tobytes()


def test_a_transposed_place_is_filled_too() -> None:
    found = np.empty((64, 1024), np.float32).T
    widen(found, EVERY.reshape(1024, 64))
    assert found.tobytes() == EVERY.astype(np.float32).tobytes()


@pytest.mark.parametrize("to", ["float32", "bfloat16"])
def test_a_tensor_of_many_parts_is_cast_as_numpy_casts_it(to: str) -> None:
    numbers = np.tile(EVERY, 3)
    found = from_array(numbers).cast(to).numpy()
    with np.errstate(all="ignore"):
        assert found.tobytes() == numbers.astype(found.dtype).tobytes()
