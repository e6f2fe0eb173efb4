"""The sum of a weight and a low-rank update: values, boxes, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.dtypes import dtype
from anyckpt.indexing import Array, Shape
from anyckpt.models.adapters import low_rank
from anyckpt.models.adapters.low_rank import TILE_ROWS, LowRankSum, tile_columns
from anyckpt.storage.gather import SCRATCH_BYTES
from anyckpt.tensor import LazyTensor, Stored, from_array

ROWS, COLUMNS, RANK = 70, 1100, 16


def made(kind: str = "float32", magnitude: bool = False, seed: int = 0) -> LowRankSum:
    rng = np.random.default_rng(seed)
    weight = from_array(rng.standard_normal((ROWS, COLUMNS)).astype("f4")).cast(kind)
    up = from_array(rng.standard_normal((ROWS, RANK)).astype("f4"))
    down = from_array(rng.standard_normal((RANK, COLUMNS)).astype("f4"))
    lengths = from_array(rng.random(ROWS).astype("f4") + 0.5) if magnitude else None
    return LowRankSum(weight, up, down, 0.75, lengths)


def exact(tensor: LowRankSum) -> np.ndarray:
    up, down = tensor.up.numpy().astype("f8"), tensor.down.numpy().astype("f8")
    whole = tensor.weight.numpy().astype("f8") + tensor.scale * up @ down
    if tensor.magnitude is None:
        return whole
    return whole * (tensor.magnitude.numpy() / np.linalg.norm(whole, axis=1))[:, None]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64"])
def test_values_are_rounded_once(kind: str, magnitude: bool) -> None:
    tensor = made(kind, magnitude)
    assert (tensor.dtype.name, tensor.shape) == (kind, (ROWS, COLUMNS))
    wide = LowRankSum(tensor.weight, tensor.up, tensor.down, tensor.scale, tensor.magnitude, dtype("float64"))
    allowed = 1e-14 if kind == "float64" else 1e-5
    assert np.abs(wide.numpy() - exact(tensor)).max() < allowed
    assert np.array_equal(tensor.numpy(), wide.cast(kind).numpy())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bits_do_not_depend_on_the_box(data: st.DataObject) -> None:
    tensor = made(magnitude=data.draw(st.booleans()))
    top, left = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, COLUMNS - 1))
    shape = (data.draw(st.integers(1, ROWS - top)), data.draw(st.integers(1, COLUMNS - left)))
    whole = made(magnitude=tensor.magnitude is not None).numpy()
    part = tensor.box((top, left), shape)
    expected = whole[top : top + shape[0], left : left + shape[1]]
    assert np.array_equal(part.numpy(), expected)
    assert np.array_equal(part.transpose().numpy(), expected.T)
    assert np.array_equal(tensor.reshape((ROWS * COLUMNS,))[left : left + 3000].numpy(), whole.ravel()[left:][:3000])


class Recorded(LazyTensor):
    """A tensor that remembers how large the boxes were that were read of it."""

    __slots__ = ("child", "largest")

    def __init__(self, child: LazyTensor) -> None:
        self.child = child
        self.dtype = child.dtype
        self.shape = child.shape
        self.largest = 0

    def read_box(self, start: Shape, out: Array) -> None:
        self.largest = max(self.largest, out.size)
        self.child.read_box(start, out)

    def pieces(self) -> Iterator[Stored]:
        return self.child.pieces()


@pytest.mark.parametrize("magnitude", [False, True])
def test_no_more_than_a_block_is_held(magnitude: bool) -> None:
    rows, columns, rank = 4096, 4096, 16
    rng = np.random.default_rng(0)
    weight = Recorded(from_array(rng.standard_normal((rows, columns)).astype("f4")))  # 64 MiB
    up = Recorded(from_array(rng.standard_normal((rows, rank)).astype("f4")))
    down = Recorded(from_array(rng.standard_normal((rank, columns)).astype("f4")))
    lengths = from_array(np.ones(rows, "f4")) if magnitude else None
    tensor = LowRankSum(weight, up, down, 1.0, lengths)
    out = np.empty((rows // 4) * columns, tensor.dtype.raw)
    tracemalloc.start()
    tensor.read_flat(columns // 2, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert weight.largest * 4 <= SCRATCH_BYTES
    assert up.largest <= TILE_ROWS * rank
    assert down.largest == rank * columns
    assert peak < 6 * SCRATCH_BYTES, "a few scratch buffers, not the 64 MiB of the weight nor the 16 MiB asked for"


def test_first_factors_are_dropped_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_KEPT_BYTES", 3 * RANK * COLUMNS * 4)
    tensors = [made(seed=seed) for seed in range(8)]
    expected = [exact(tensor) for tensor in tensors]
    for _ in range(2):
        for tensor, values in zip(tensors, expected, strict=True):
            assert np.abs(tensor.numpy() - values).max() < 1e-5
    kept = [tensor for tensor in tensors if tensor._down._array is not None]
    assert len(kept) <= 3


def test_tiles() -> None:
    assert [tile_columns(rank) for rank in (1, 16, 64, 512)] == [4096, 512, 128, 64]
    assert tile_columns(RANK) < COLUMNS and TILE_ROWS < ROWS, "the tests above meet several tiles"


def test_rows_without_length_are_not_numbers() -> None:
    zeros = from_array(np.zeros((2, 3), "f4"))
    tensor = LowRankSum(zeros, from_array(np.zeros((2, 1), "f4")), from_array(np.zeros((1, 3), "f4")), 1.0,
                        from_array(np.ones(2, "f4")))  # fmt: skip
    assert np.isnan(tensor.numpy()).all()  # as in peft
