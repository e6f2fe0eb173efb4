"""Products of codes and scales, from tables and one by one."""

from __future__ import annotations

import numpy as np
import pytest

from anyckpt.dtypes import dtype
from anyckpt.indexing import CACHED_ELEMENTS
from anyckpt.quantization.nodes import Multiply, scaled
from anyckpt.quantization.numbers import E2M1, values_of
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Stored, from_array


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("eight", [False, True])
def test_a_table_of_products_has_every_bit_of_the_product(eight: bool, kind: str, to: str) -> None:
    table = values_of(dtype("float8_e5m2")) if eight else E2M1
    count = table.size
    codes = np.tile(np.arange(count, dtype=np.uint8), 256).reshape(256, count)
    scales = Stored(MemorySource(bytes(range(256))), 0, dtype(kind), (256, 1))
    found = scaled(from_array(codes), table, scales, (1, count), dtype(to))
    factors = np.repeat(values_of(dtype(kind)), count).reshape(256, count)
    assert found.numpy().tobytes() == Multiply(table, dtype(to))(codes, factors).tobytes()
    assert found.permute((1, 0)).numpy().tobytes() == found.numpy().T.tobytes()
    assert found[3:9, 1:7].numpy().tobytes() == found.numpy()[3:9, 1:7].tobytes()


def test_more_than_the_cache_holds() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (3, CACHED_ELEMENTS), dtype=np.uint8)
    scales = np.array([[0.5], [3.0], [7.25]], np.float32)
    table = values_of(dtype("float8_e4m3fn"))
    found = scaled(from_array(codes), table, from_array(scales), (1, CACHED_ELEMENTS), dtype("float32")).numpy()
    np.testing.assert_array_equal(found, table[codes] * scales)
