"""Columns of the same rows in several files are filled from one reading of the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.sample import make_source, shrink_blocks

from anyckpt.dtypes import dtype
from anyckpt.engine import execute, run, together
from anyckpt.engine.blocks import cut
from anyckpt.engine.plan import Literal, OutputFile, Part, Plan, TensorData
from anyckpt.errors import FormatError
from anyckpt.storage import LocalFile
from anyckpt.tensor import Stored, concatenate

ROWS, WIDTH = 600, 256
SIZE = ROWS * WIDTH * 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source.bin", 3 * SIZE + 100)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyckpt.engine import blocks, checksum, files

    for module in (blocks, checksum, files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 16384)
    monkeypatch.setattr(run, "_SYNC_EVERY", run._SYNC_EVERY)
    monkeypatch.setattr(files, "_DIRECT_MINIMUM", files._DIRECT_MINIMUM)
    shrink_blocks(16384)


def weights(source: Path, count: int = 3) -> list[Stored]:
    data = LocalFile(source)
    return [Stored(data, 100 + number * SIZE, dtype("bfloat16"), (ROWS, WIDTH)) for number in range(count)]


def row_parallel(source: Path, ways: int, stages: int = 1) -> Plan:
    """A file per rank: two weights cut along axis 1, one along axis 0, one that all have; stages of equal shapes."""
    each = WIDTH // ways
    files = []
    for stage in range(stages):
        first, second, third = weights(source) if stage == 0 else [*weights(source)[1:], weights(source)[0]]
        for rank in range(ways):
            parts: list[Part] = [
                Literal(b"header of %d" % stage),
                TensorData("proj", first.narrow(1, rank * each, each)),
                TensorData("fc1", second.narrow(0, 0, ROWS // 2)),
                TensorData("fc2", third.narrow(1, rank * each, each)),
                TensorData("norm", first.narrow(0, 5, 1)),
            ]
            files.append(OutputFile(f"{stage}.{rank}", tuple(parts)))
    return Plan("x", tuple(files))


def written(plan: Plan, path: Path, **options: object) -> tuple[dict[str, bytes], execute.Report]:
    report = execute.execute(plan, str(path), **options)  # type: ignore[arg-type]
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}, report


@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_read_once_however_many_ranks_share_them(
    ways: int, workers: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = row_parallel(source, ways)
    found, report = written(plan, tmp_path / "together", workers=workers, memory=workers * (96 << 20))
    others = ways * (SIZE // 2 + WIDTH * 2)  # fc1 and norm, which every file has
    assert report.bytes_read == 2 * SIZE + others
    monkeypatch.setattr(run, "MOST_TOGETHER", 1)
    expected, alone = written(plan, tmp_path / "alone", workers=workers)
    assert alone.bytes_read > report.bytes_read + (ways - 1) * SIZE // 2
    assert found == expected
    for rank in range(ways):
        data = b"header of 0" + b"".join(
            part.tensor.numpy().tobytes() for part in plan.files[rank].parts if isinstance(part, TensorData)
        )
        assert found[f"0.{rank}"] == data


def test_with_little_memory_fewer_are_filled_together(source: Path, tmp_path: Path) -> None:
    plan = row_parallel(source, 8)
    roomy, most = written(plan, tmp_path / "a", workers=1, memory=96 << 20)
    tight, least = written(plan, tmp_path / "b", workers=1, memory=16 << 20)
    assert roomy == tight and most.bytes_read < least.bytes_read


def test_equal_shapes_elsewhere_in_the_file_are_not_taken_for_the_same_rows(source: Path, tmp_path: Path) -> None:
    """Layers of two stages have equal shapes and lie in one source file."""
    plan = row_parallel(source, 4, stages=2)
    blocks = [block for number, file in enumerate(plan.files) for block in cut(number, file)[0]]
    found = list(together.gangs(plan.files, blocks, 8))
    assert sorted(block.offset * 100 + block.file for gang in found for block in gang.blocks) == sorted(
        block.offset * 100 + block.file for block in blocks
    )
    for gang in found:
        assert len({block.pieces for block in gang.blocks}) == 1
        if any(gang.shared):
            assert [block.file // 4 for block in gang.blocks] in ([0] * 4, [1] * 4)
    assert any(any(gang.shared) for gang in found)
    files, report = written(plan, tmp_path / "x", workers=2)
    assert report.bytes_read < 2 * (2 * SIZE + 4 * (SIZE // 2 + WIDTH * 2)) + 1
    for number, file in enumerate(plan.files):
        parts = [part.tensor.numpy().tobytes() for part in file.parts if isinstance(part, TensorData)]
        assert files[f"{number // 4}.{number % 4}"].endswith(b"".join(parts))


def test_what_lies_together_or_in_long_runs_is_read_by_itself(source: Path) -> None:
    (one,) = weights(source, 1)
    wide = Stored(one.source, 0, dtype("bfloat16"), (2, 3 * SIZE // 4))
    for tensors in (
        [one.narrow(0, 0, 300), one.narrow(0, 300, 300)],
        [wide.narrow(1, 0, 1 << 16), wide.narrow(1, 1 << 16, 1 << 16)],
        [one.narrow(1, 0, 8).cast("float32"), one.narrow(1, 8, 8).cast("float32")],
        [concatenate([one.narrow(1, 0, 8), one.narrow(1, 9, 8)], 1)] * 2,
    ):
        files = [OutputFile(str(n), (TensorData("w", tensor),)) for n, tensor in enumerate(tensors)]
        blocks = [block for number, file in enumerate(files) for block in cut(number, file)[0]]
        assert all(len(gang.blocks) == 1 and not any(gang.shared) for gang in together.gangs(files, blocks, 8))


def test_elements_in_the_middle_of_rows(source: Path) -> None:
    (one,) = weights(source, 1)
    parts = [one.narrow(1, start, 64) for start in (64, 0, 192)]
    assert all(isinstance(part, Stored) for part in parts)
    for start, count in ((0, 64 * ROWS), (13, 1), (13, 51), (70, 64 * 300 + 17), (64 * ROWS - 3, 3)):
        outs = [np.empty(count, np.uint16) for _ in parts]
        together.read_together(parts, start, outs)  # type: ignore[arg-type]
        for part, out in zip(parts, outs, strict=True):
            np.testing.assert_array_equal(out, part.numpy().view(np.uint16).reshape(-1)[start : start + count])


def test_a_file_that_ends_early_is_named_with_its_tensor(source: Path, tmp_path: Path) -> None:
    plan = row_parallel(source, 4)
    with open(source, "r+b") as file:
        file.truncate(SIZE // 2)
    with pytest.raises(FormatError, match="proj"):
        execute.execute(plan, str(tmp_path / "x"), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source.bin"]
