"""The view algebra against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt import tensor as lazy
from anyckpt.checkpoint import storage_key
from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.storage import MemorySource
from anyckpt.tensor import LazyTensor, Stored

Pair = tuple[LazyTensor, np.ndarray[Any, Any]]


def stored(shape: tuple[int, ...], seed: int = 0) -> Pair:
    array = (np.arange(math.prod(shape), dtype=np.float32) + seed).reshape(shape)
    return lazy.from_array(array), array


@st.composite
def chunked(draw: st.DrawFn) -> Pair:
    """A tensor cut at random into boxes, some of them stored in Fortran order inside a larger storage."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    _, array = stored(shape, draw(st.integers(0, 9)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(0, len(boxes) - 1))
        start, size = boxes[number]
        axis = draw(st.integers(0, len(shape) - 1))
        if size[axis] < 2:
            continue
        cut = draw(st.integers(1, size[axis] - 1))
        low = (*size[:axis], cut, *size[axis + 1 :])
        high = (*size[:axis], size[axis] - cut, *size[axis + 1 :])
        boxes[number : number + 1] = [
            (start, low),
            ((*start[:axis], start[axis] + cut, *start[axis + 1 :]), high),
        ]
    boxes = draw(st.permutations(boxes))
    tiles = []
    for start, size in boxes:
        part = array[tuple(slice(b, b + n) for b, n in zip(start, size, strict=True))]
        if draw(st.booleans()):
            source = MemorySource(b"\0" * 12 + part.T.tobytes() + b"\0" * 4)
            tiles.append(Stored(source, 12, dtype("float32"), size[::-1]).transpose())
        else:
            tiles.append(lazy.from_array(np.ascontiguousarray(part)))
    return lazy.mosaic(dtype("float32"), shape, [b for b, _ in boxes], tiles), array


@st.composite
def step(draw: st.DrawFn, pair: Pair) -> Pair:
    tensor, array = pair
    kind = draw(st.sampled_from(["slice", "index", "reshape", "permute", "pad", "concat", "cast", "every"]))
    axis = draw(st.integers(0, max(0, array.ndim - 1)))
    if kind == "cast":
        to = draw(st.sampled_from(["float32", "float64", "float16", "int32"]))
        return tensor.cast(to), array.astype(to)
    if kind == "reshape":
        factors = [n for n in array.shape if n > 1]
        size = array.size
        wanted = []
        while size > 1 and draw(st.booleans()):
            options = [d for d in range(2, size + 1) if size % d == 0]
            wanted.append(draw(st.sampled_from(options)))
            size //= wanted[-1]
        wanted = [*wanted, size] if draw(st.booleans()) or not factors else [*factors, 1]
        wanted = wanted if math.prod(wanted) == array.size else [array.size]
        return tensor.reshape(wanted), array.reshape(wanted)
    if array.ndim == 0:
        return pair
    if kind == "slice":
        low = draw(st.integers(0, array.shape[axis]))
        high = draw(st.integers(low, array.shape[axis]))
        key = (slice(None),) * axis + (slice(low, high, draw(st.integers(1, 3))),)
        return tensor[key], array[key]
    if kind == "every":
        n = draw(st.integers(1, 3))
        key = (slice(None),) * axis + (slice(None, None, n),)
        return tensor.every(axis, n), array[key]
    if kind == "index" and array.shape[axis]:
        key = (slice(None),) * axis + (draw(st.integers(-array.shape[axis], array.shape[axis] - 1)),)
        return tensor[key], array[key]
    if kind == "permute":
        order = draw(st.permutations(range(array.ndim)))
        return tensor.permute(order), array.transpose(order)
    if kind == "pad":
        extra = draw(st.integers(0, 3))
        width = [(0, extra if a == axis else 0) for a in range(array.ndim)]
        return tensor.pad(axis, array.shape[axis] + extra), np.pad(array, width)
    if kind == "concat":
        return lazy.concatenate([tensor, tensor], axis), np.concatenate([array, array], axis)
    return pair


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_composition_equals_numpy(data: st.DataObject) -> None:
    tensor, array = data.draw(chunked())
    for _ in range(data.draw(st.integers(1, 6))):
        tensor, array = data.draw(step((tensor, array)))
        assert tensor.shape == array.shape
        if array.size > 3000:
            break
    assert np.array_equal(tensor.numpy(), array)
    if array.size:
        start = data.draw(st.integers(0, array.size - 1))
        count = data.draw(st.integers(1, array.size - start))
        flat = np.empty(count, dtype=tensor.dtype.raw)
        tensor.read_flat(start, flat)
        assert flat.tobytes() == np.ascontiguousarray(array).reshape(-1)[start : start + count].tobytes()
    joined = b"".join(chunk.tobytes() for chunk in tensor.chunks(16))
    assert joined == np.ascontiguousarray(array).tobytes()


def test_a_large_strided_read_goes_through_bounded_spans() -> None:
    array = np.arange(3000 * 1200, dtype=np.int32).reshape(3000, 1200)
    tensor = lazy.from_array(array)
    assert np.array_equal(tensor[:, 300:301].numpy(), array[:, 300:301])
    assert np.array_equal(tensor[:, 100:900].numpy(), array[:, 100:900])
    assert np.array_equal(tensor.transpose().numpy(), array.T)
    assert np.array_equal(tensor.transpose()[17].numpy(), array[:, 17])
    assert np.array_equal(tensor.cast("float64")[:, 5:1100].numpy(), array[:, 5:1100].astype(np.float64))


def test_a_slice_reads_only_its_bytes() -> None:
    class Counting(MemorySource):
        read_bytes = 0

        def _read_into(self, offset: int, buffer: memoryview) -> None:
            Counting.read_bytes += len(buffer)
            super()._read_into(offset, buffer)

    array = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    tensor = Stored(Counting(array), 0, dtype("uint16"), (64, 64))
    assert np.array_equal(tensor[3:5].numpy(), array[3:5])
    assert Counting.read_bytes == 2 * 64 * 2


def test_bytes_beyond_the_source_are_an_error_that_names_it() -> None:
    source = MemorySource(b"\0" * 10, name="weights.bin")
    with pytest.raises(FormatError, match=r"weights\.bin"):
        Stored(source, 4, dtype("float32"), (2,)).numpy()
    with pytest.raises(FormatError):
        Stored(source, 0, dtype("float32"), (2, 2), (0, 3)).check()


@pytest.mark.parametrize(
    ("starts", "shapes", "problem"),
    [
        ([(0, 0)], [(2, 3)], "missing"),
        ([(0, 0), (2, 0)], [(2, 4), (1, 4)], "missing"),
        ([(0, 0), (1, 0)], [(3, 4), (3, 4)], "overlap"),
        ([(0, 0), (0, 0), (2, 0)], [(2, 4), (1, 4), (1, 4)], "overlap"),
        ([(0, 0), (3, 0)], [(3, 4), (2, 4)], "outside"),
    ],
)
def test_pieces_must_cover_exactly_once(starts: Any, shapes: Any, problem: str) -> None:
    tiles = [stored(shape)[0] for shape in shapes]
    with pytest.raises(AnyckptError, match=problem):
        lazy.mosaic(dtype("float32"), (4, 4), starts, tiles)


def test_a_repeated_element_is_not_blown_up() -> None:
    tensor = Stored(MemorySource(b"\0" * 4), 0, dtype("float32"), (1 << 31, 1 << 31), (0, 0))
    with pytest.raises(UsageError, match="repeats"):
        tensor.numpy()
    assert tensor[5, :3].numpy().tolist() == [0, 0, 0]


def test_casts_round_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, np.inf, np.nan], dtype=np.float32)
    assert [float(v) for v in lazy.from_array(values).cast("bf16").numpy()[:5]] == [
        1.0,
        1.0,
        1.015625,
        -2.5,
        np.inf,
    ]


def test_only_the_same_elements_count_as_the_same_storage() -> None:
    source = MemorySource(np.arange(12, dtype=np.float32))
    one, other = (Stored(source, 0, dtype("float32"), (3, 4)) for _ in range(2))
    assert storage_key(one) == storage_key(other) is not None
    assert storage_key(one.cast("bf16")) == storage_key(other.cast("bf16"))
    assert storage_key(one.cast("bf16")) != storage_key(one.cast("fp16"))
    assert storage_key(one.transpose()) != storage_key(one)
    doubled = lazy.Mapped((one,), dtype("float32"), lambda values: values * 2)
    halved = lazy.Mapped((one,), dtype("float32"), lambda values: values / 2)
    assert storage_key(doubled) != storage_key(halved)
    assert storage_key(lazy.concatenate([one, other], 0)) is None


@pytest.mark.parametrize("index", ["a", 1.5, None, True, (0, 1.0), [0]])
def test_what_is_no_index_is_an_error(index: Any) -> None:
    tensor = lazy.from_array(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(UsageError, match="neither a whole number nor a slice"):
        tensor[index]
    assert tensor[np.int64(1)].shape == (3,)


def test_a_contiguous_part_goes_into_a_wider_array_in_few_reads() -> None:
    class Counting(MemorySource):
        reads = 0

        def _read_into(self, offset: int, buffer: memoryview) -> None:
            Counting.reads += 1
            super()._read_into(offset, buffer)

    array = np.arange(1024 * 256, dtype=np.uint16).reshape(1024, 256)
    parts = [Stored(Counting(array), 0, dtype("uint16"), array.shape) for _ in range(4)]
    assert np.array_equal(lazy.concatenate(parts, 1).numpy(), np.concatenate([array] * 4, axis=1))
    assert Counting.reads == len(parts)


class Counted(lazy.LazySequence):
    """Tensors of one element, which notes which are made."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.count

    def make(self, index: int) -> LazyTensor:
        self.made.append(index)
        return lazy.from_array(np.array([index], np.int32))


def test_parts_of_a_sequence_are_made_when_they_are_asked_for() -> None:
    whole = Counted(10)
    some = whole[2:9][1::2]
    assert (len(some), whole.made) == (3, [])
    assert [int(tensor.numpy()[0]) for tensor in some] == [3, 5, 7] == whole.made
    assert int(some[-1].numpy()[0]) == 7
