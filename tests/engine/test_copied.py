"""Live state copied into shared memory: the plan that comes out reads what the state was, whatever happens to it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import file_bytes

from anyckpt.dtypes import dtype
from anyckpt.engine.copied import Copies, put
from anyckpt.engine.plan import OutputFile, Plan, SourceData, TensorData
from anyckpt.errors import FormatError, UsageError
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.shared_memory import SharedMemory, receive, received
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored, concatenate

NUMBER = 7


@pytest.fixture(scope="module")
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory()
    receive(NUMBER, made.descriptor)
    yield made
    made.close()


@st.composite
def boxes(draw: st.DrawFn, source: MemorySource | OwnedSource) -> LazyTensor:
    """A part of a live tensor of 12 by 20, as layouts make them."""
    low = [draw(st.integers(0, 11)), draw(st.integers(0, 19))]
    high = [draw(st.integers(low[0] + 1, 12)), draw(st.integers(low[1] + 1, 20))]
    tensor: LazyTensor = Stored(source, 0, dtype("float32"), (12, 20)).box(
        tuple(low), tuple(b - a for a, b in zip(low, high, strict=True))
    )
    if draw(st.booleans()):
        tensor = tensor.permute((1, 0))
    if draw(st.booleans()):
        tensor = concatenate([tensor, tensor], draw(st.integers(0, 1)))
    return tensor.cast("bfloat16") if draw(st.booleans()) else tensor


@settings(deadline=None)
@given(st.data())
def test_the_state_as_it_was(memory: SharedMemory, data: st.DataObject) -> None:
    arrays = [np.random.default_rng(seed).standard_normal((12, 20)).astype(np.float32) for seed in range(3)]
    sources = [
        MemorySource(arrays[0]),
        OwnedSource(1, ("a",), 960, MemorySource(arrays[1]), "of process 1"),
        OwnedSource(2, ("b",), 960, MemorySource(arrays[2]), "of process 2"),
    ]
    mine = [
        TensorData(str(n), data.draw(boxes(sources[data.draw(st.integers(0, 1))])))
        for n in range(data.draw(st.integers(1, 6)))
    ]
    start = data.draw(st.integers(0, 900))
    part = SourceData(sources[0].slice(start, data.draw(st.integers(1, 960 - start))))
    others = TensorData("other", Stored(sources[2], 0, dtype("float32"), (12, 20)))
    plan = Plan("sample", (OutputFile("mine", (*mine, part)), OutputFile("others", (others,))))
    expected = file_bytes(plan.files[0])
    where = put(plan, 1, memory, NUMBER)
    for array in arrays:
        array[:] = np.nan
    again: Plan = pickle.loads(received(NUMBER, *where))
    assert file_bytes(again.files[0]) == expected
    with pytest.raises(UsageError, match="held by another process"):
        file_bytes(again.files[1])
    assert Copies(plan, 1).nbytes <= 2 * 960 + 64 * 24


def test_what_was_not_copied_is_not_read_from_elsewhere(memory: SharedMemory) -> None:
    source = MemorySource(np.arange(960, dtype=np.uint8))
    plan = Plan("sample", (OutputFile("", (TensorData("w", Stored(source, 8, dtype("uint8"), (10,))),)),))
    again = pickle.loads(received(NUMBER, *put(plan, None, memory, NUMBER)))
    (piece,) = again.files[0].parts[0].tensor.pieces()
    assert piece.source.read(8, 10) == bytes(range(8, 18))
    with pytest.raises(FormatError, match="was not copied where it is read"):
        piece.source.read(7, 2)
    with pytest.raises(FormatError, match="was not copied where it is read"):
        piece.source.read(17, 2)
