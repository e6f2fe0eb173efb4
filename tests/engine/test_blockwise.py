"""Codes and scales computed from one reading of a weight, in bounded memory, wherever they are written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.sample import run_share, shrink_blocks
from tests.support import file_bytes

from anyckpt import blockwise as module
from anyckpt.blockwise import BlockFunction, Output, Tiles, blockwise, keeping
from anyckpt.dtypes import dtype
from anyckpt.engine.destination import Share
from anyckpt.engine.execute import Report, execute
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import Literal, OutputFile, Part, Plan, TensorData
from anyckpt.engine.shared_run import finish
from anyckpt.errors import UsageError
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor, Stored, concatenate


@dataclass(frozen=True)
class LargestOf(BlockFunction):
    """Signed bytes of which 127 stands for the block's largest magnitude, and that magnitude; a toy.

    Attributes:
        rows, columns: of a block; 0 for all.
    """

    rows: int
    columns: int

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.rows or shape[0], self.columns or shape[1]

    def outputs(self, shape: tuple[int, ...]) -> tuple[Output, ...]:
        return Output(dtype("int8"), (1, 1)), Output(dtype("float32"), self.block(shape))

    def __call__(self, values: Any) -> tuple[Any, ...]:
        rows, columns = self.rows or values.shape[0], self.columns or values.shape[1]
        numbers = values.astype(np.float32)
        grid = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
        padded = np.zeros((grid[0] * rows, grid[1] * columns), np.float32)
        padded[: values.shape[0], : values.shape[1]] = numbers
        blocks = padded.reshape(grid[0], rows, grid[1], columns)
        scales = np.abs(blocks).max((1, 3))
        safe = np.where(scales == 0, 1, scales)
        codes = np.rint(blocks * (127 / safe)[:, None, :, None]).astype(np.int8).reshape(padded.shape)
        return codes[: values.shape[0], : values.shape[1]], scales


def expected(values: Any, function: LargestOf) -> tuple[Any, Any]:
    rows, columns = function.block(values.shape)
    grid = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    codes, scales = np.zeros(values.shape, np.int8), np.zeros(grid, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            where = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            block = values[where].astype(np.float32)
            scales[i, j] = np.abs(block).max()
            codes[where] = np.rint(block * (np.float32(127) / (scales[i, j] or 1)))
    return codes, scales


KINDS = {
    "rows": LargestOf(1, 0),
    "blocks": LargestOf(32, 32),
    "groups": LargestOf(1, 16),
    "bands": LargestOf(128, 0),
}


@pytest.fixture
def weights(tmp_path: Path) -> list[Stored]:
    shapes = [(700, 96), (333, 250), (64, 1000), (5, 7)]
    rng = np.random.default_rng(3)
    path = tmp_path / "weights"
    found, offset = [], 0
    with open(path, "wb") as file:
        for shape in shapes:
            file.write(rng.standard_normal(shape).astype(ml_dtypes.bfloat16).tobytes())
    source = LocalFile(path)
    for shape in shapes:
        found.append(Stored(source, offset, dtype("bfloat16"), shape))
        offset += found[-1].nbytes
    return found


def beside(outputs: list[tuple[LazyTensor, ...]]) -> Plan:
    """Each weight's scales after its codes, in one file."""
    parts: list[Part] = [Literal(b"header")]
    for number, tensors in enumerate(outputs):
        parts += [TensorData(f"{number}.{index}", tensor) for index, tensor in enumerate(tensors)]
    return Plan("sample", (OutputFile("", tuple(parts)),))


def scales_first(outputs: list[tuple[LazyTensor, ...]]) -> Plan:
    """All scales at the start of the file, as where tensors are sorted by the width of their elements."""
    parts: list[Part] = [TensorData(f"{number}.1", scales) for number, (_, scales) in enumerate(outputs)]
    parts += [TensorData(f"{number}.0", codes) for number, (codes, _) in enumerate(outputs)]
    return Plan("sample", (OutputFile("", tuple(parts)),))


def apart(outputs: list[tuple[LazyTensor, ...]]) -> Plan:
    """Scales and codes in files of their own, and the codes of each weight in two."""
    files = [OutputFile("scales", tuple(TensorData(f"{n}.1", scales) for n, (_, scales) in enumerate(outputs)))]
    for name, half in (("low", slice(None, 3)), ("high", slice(3, None))):
        parts = tuple(TensorData(f"{n}.0", codes[half], name) for n, (codes, _) in enumerate(outputs))
        files.append(OutputFile(name, parts))
    return Plan("sample", tuple(files))


def written(plan: Plan, path: Path, **options: Any) -> Report:
    report = execute(plan, str(path), **options)
    for file in plan.files:
        assert (path / file.path if file.path else path).read_bytes() == file_bytes(file)
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lay_out", [beside, scales_first, apart])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_source_byte_is_read_once(
    weights: list[Stored],
    tmp_path: Path,
    kind: str,
    lay_out: Callable[[list[tuple[LazyTensor, ...]]], Plan],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink_blocks(8192)
    monkeypatch.setattr(module, "_TILE_BYTES", 20_000)
    plan = lay_out([blockwise(weight, KINDS[kind]) for weight in weights])
    report = written(plan, tmp_path / "out", workers=workers)
    assert report.bytes_read == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_values_of_their_blocks(
    weights: list[Stored], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", 5_000)
    for weight in weights:
        codes, scales = blockwise(weight, KINDS[kind])
        wanted = expected(weight.numpy(), KINDS[kind])
        np.testing.assert_array_equal(codes.numpy(), wanted[0])
        np.testing.assert_array_equal(scales.numpy(), wanted[1])
        np.testing.assert_array_equal(codes[2:5, 1:6].numpy(), wanted[0][2:5, 1:6])
        np.testing.assert_array_equal(codes.transpose().numpy(), wanted[0].T)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_box_of_any_tiling(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    function = LargestOf(data.draw(st.integers(0, 50)), data.draw(st.integers(0, 50)))
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    before, module._TILE_BYTES = module._TILE_BYTES, data.draw(st.integers(1, 5000))
    try:
        codes, scales = blockwise(module_array(values), function)
    finally:
        module._TILE_BYTES = before
    wanted = expected(values, function)
    tiles = Tiles(data.draw(st.sampled_from([0, 300, 1 << 20])))
    with keeping(tiles):
        for _ in range(3):
            low = [data.draw(st.integers(0, n - 1)) for n in shape]
            high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
            where = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            np.testing.assert_array_equal(codes[where].numpy(), wanted[0][where])
        np.testing.assert_array_equal(scales.numpy(), wanted[1])
        np.testing.assert_array_equal(codes.numpy(), wanted[0])


def module_array(values: Any) -> LazyTensor:
    from anyckpt.tensor import from_array

    return from_array(values)


def test_held_tiles_are_bounded_and_let_go(weights: list[Stored], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", 20_000)
    codes, scales = blockwise(weights[0], KINDS["rows"])
    tiles = Tiles(30_000)
    with keeping(tiles):
        for at in range(0, 700, 50):
            codes[at : at + 50].numpy()
            assert tiles._held <= 30_000
        scales.numpy()
        assert (tiles._held, len(tiles._tiles)) == (0, 0)
    small = Tiles(0)
    with keeping(small):  # too little to hold anything: computed again, and right
        np.testing.assert_array_equal(codes.numpy(), expected(weights[0].numpy(), KINDS["rows"])[0])
        np.testing.assert_array_equal(scales.numpy(), expected(weights[0].numpy(), KINDS["rows"])[1])


def test_identity_pickles_and_shares(weights: list[Stored], tmp_path: Path) -> None:
    shrink_blocks(8192)
    plans = [apart([blockwise(w, KINDS[kind]) for w in weights]) for kind in ("rows", "blocks")]
    assert fingerprint(plans[0], ()).obstacle is None
    assert fingerprint(plans[0], ()) == fingerprint(pickle.loads(pickle.dumps(plans[0])), ())
    assert fingerprint(plans[0], ()) != fingerprint(plans[1], ())
    for number in (2, 1, 3):
        run_share(plans[0], str(tmp_path / "out"), Share(number, 3))
    finish(plans[0], str(tmp_path / "out"), 3)
    assert all((tmp_path / "out" / file.path).read_bytes() == file_bytes(file) for file in plans[0].files)


def test_a_source_that_is_made_of_others(weights: list[Stored], tmp_path: Path) -> None:
    joined = concatenate([weights[0].narrow(1, 0, 90), weights[0].narrow(1, 3, 90)], 0).cast("float32")
    codes, scales = blockwise(joined, KINDS["blocks"])
    wanted = expected(joined.numpy(), KINDS["blocks"])
    np.testing.assert_array_equal(codes.numpy(), wanted[0])
    np.testing.assert_array_equal(scales.numpy(), wanted[1])


def test_blocks_that_cannot_be_held_are_refused(weights: list[Stored]) -> None:
    wide = Stored(weights[0].source, 0, dtype("float32"), (1 << 20, 1 << 10), (0, 1))
    with pytest.raises(UsageError, match="too large to be computed in bounded memory"):
        blockwise(wide, LargestOf(0, 0))

    @dataclass(frozen=True)
    class Odd(LargestOf):
        def outputs(self, shape: tuple[int, ...]) -> tuple[Output, ...]:
            return (Output(dtype("int8"), (1, 3)),)

    with pytest.raises(UsageError, match="does not divide the blocks"):
        blockwise(weights[0], Odd(4, 4))


def test_an_error_in_a_source_reaches_every_thread(weights: list[Stored], tmp_path: Path) -> None:
    from anyckpt.errors import FormatError

    shrink_blocks(8192)
    plan = beside([blockwise(weight, KINDS["bands"]) for weight in weights])
    with open(tmp_path / "weights", "r+b") as file:
        file.truncate(50_000)
    with pytest.raises(FormatError, match="shorter"):
        execute(plan, str(tmp_path / "out"), workers=4)
