"""Products of codes and scales, from tables and one by one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from anyckpt.dtypes import dtype
from anyckpt.indexing import CACHED_ELEMENTS
from anyckpt.quantization import nodes, pairs
from anyckpt.quantization.nodes import Halved, Multiply, Paired, product, quotient, scaled
from anyckpt.quantization.numbers import e2m1, values_of
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Stored, from_array


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("eight", [False, True])
def test_a_table_of_products_has_every_bit_of_the_product(eight: bool, kind: str, to: str) -> None:
    table = values_of(dtype("float8_e5m2")) if eight else e2m1()
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


def paired(to: str, kind: str, width: int, how: str) -> tuple[Paired, np.ndarray]:
    """Every pair of codes beside every scale, as stored; and the products, in float32 and rounded once."""
    columns = 3 * width
    packed = np.resize(np.arange(256, dtype=np.uint8), (4, 256, columns // 2))
    packed[2:] = np.random.default_rng(0).integers(0, 256, (2, 256, columns // 2))
    bytes_ = np.resize(np.arange(256, dtype=np.uint8), (4, 256, 3))
    scales = Stored(MemorySource(bytes_.tobytes()), 0, dtype(kind), bytes_.shape)
    common = np.array([0.37], np.float32)
    numbers = values_of(dtype(kind))[bytes_]
    with np.errstate(all="ignore"):
        numbers = {"": numbers, "product": numbers * common, "quotient": numbers / common}[how]
    given = {"": lambda: scales, "product": lambda: product(scales, from_array(common))}
    given["quotient"] = lambda: quotient(scales, from_array(common))
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(4, 256, columns)
    exact = Multiply(e2m1(), dtype(to))(codes, np.repeat(numbers, width, axis=-1))
    found = scaled(Halved(from_array(packed), 2), e2m1(), given[how](), (1, 1, width), dtype(to))
    assert isinstance(found, Paired)
    return found, exact


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "width", "how"),
    [
        ("float8_e8m0fnu", 32, ""),
        ("uint8", 32, ""),
        ("float8_e4m3fn", 16, "product"),
        ("float8_e4m3fn", 16, "quotient"),
        ("float8_e4m3fn", 128, ""),
    ],
)
def test_pairs_have_every_bit_of_the_products(
    to: str, kind: str, width: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part begins or ends within a block or a byte, and where they are read in another order."""
    monkeypatch.setattr(nodes, "_WORTH_A_TABLE", 1)
    monkeypatch.setattr(pairs, "CACHED_ELEMENTS", 1024)
    found, exact = paired(to, kind, width, how)
    raw = exact.view(dtype(to).raw)
    assert found.numpy().tobytes() == exact.tobytes()
    assert pickle.loads(pickle.dumps(found)).numpy().tobytes() == exact.tobytes()
    assert found.permute((2, 0, 1)).numpy().tobytes() == exact.transpose(2, 0, 1).tobytes()
    assert found.reshape((2, 512, 3 * width)).numpy().tobytes() == exact.tobytes()
    assert found.reshape((1024, 3, width)).numpy().tobytes() == exact.tobytes()
    for low, high in ((0, width), (width, 3 * width), (1, width), (width, 2 * width + 2), (width, width)):
        part = found[1:3, 5:250, low:high]
        assert part.numpy().tobytes() == exact[1:3, 5:250, low:high].tobytes()
        assert isinstance(part, Paired) == (low % width == high % width == 0 and low < high)
    out = np.empty((300, 7), raw.dtype)
    found.read_flat(11 * width + 3, out.reshape(-1))
    assert out.tobytes() == exact.reshape(-1)[11 * width + 3 :][: out.size].tobytes()
    room = np.empty(raw.nbytes + 2, np.uint8)[2:].view(raw.dtype).reshape(raw.shape)  # at no multiple of two elements
    found.read_box((0, 0, 0), room)
    assert room.tobytes() == exact.tobytes()


def test_few_codes_and_scales_of_several_bytes_are_multiplied_one_by_one() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    wide = from_array(np.ones((64, 4), np.float32))
    assert not isinstance(scaled(Halved(from_array(packed), 1), e2m1(), wide, (1, 32), dtype("bfloat16")), Paired)
    narrow = from_array(np.full((64, 4), 127, np.uint8))
    few = scaled(Halved(from_array(packed), 1), e2m1(), narrow, (1, 32), dtype("float32"))
    assert not isinstance(few, Paired)
    np.testing.assert_array_equal(few.numpy()[:, ::2], e2m1()[packed & 15])
