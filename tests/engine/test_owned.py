"""Processes that each have a part of what is written: each gives its own bytes, and none asks for another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.memory_destination import MemoryDestination, ObjectStore
from tests.engine.sample import run_share, shrink_blocks

from anyckpt.dtypes import dtype
from anyckpt.engine.destination import Share
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import Computed, Literal, OutputFile, Part, Plan, SourceData, TensorData, small_file
from anyckpt.engine.shared_run import finish
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored, concatenate

PROCESSES = 3
ROWS = 64  # of 64 float32: 16,384 bytes


@pytest.fixture(autouse=True)
def small_blocks(restored_block_sizes: None) -> Iterator[None]:
    shrink_blocks(8192)
    yield


def contents(owner: int, what: str) -> Any:
    seed = owner * 1000 + sum(map(ord, what))
    return np.random.default_rng(seed).integers(0, 255, ROWS * 64 * 4, dtype=np.uint8)


def piece(rank: int, owner: int, what: str, shape: tuple[int, ...] = (ROWS, 64)) -> LazyTensor:
    data = MemorySource(contents(owner, what)) if rank == owner else None  # live state of the process, or unknown
    source = OwnedSource(owner, ("step 5", what, owner), ROWS * 64 * 4, data, f"{what} of process {owner}")
    return Stored(source, 0, dtype("float32"), shape)


def plan_of(rank: int) -> Plan:
    """What process ``rank`` knows: all shapes, and its own elements."""
    owners = range(1, PROCESSES + 1)
    files = [OutputFile(f"{k}.bin", (TensorData("w", piece(rank, k, "w"), f"{k}"),)) for k in owners]
    mixed: list[Part] = [Literal(b"header of an odd length")]
    for owner in owners:
        mixed.append(TensorData(f"bias{owner}", piece(rank, owner, "bias")[0, :7]))
        mixed.append(Computed(4, (len(mixed) - 1,), crc_bytes))
    rows = concatenate([piece(rank, owner, "rows") for owner in owners], 0)
    mixed += [TensorData("rows", rows), SourceData(MemorySource(b"artifact" * 3000))]
    files.append(OutputFile("mixed.bin", tuple(mixed)))
    files.append(small_file("done", "5", stage=2))
    return Plan("sample", tuple(files))


def crc_bytes(crcs: Any) -> bytes:
    return int(crcs[0]).to_bytes(4, "little")


def assert_whole(folder: Path) -> None:
    owners = range(1, PROCESSES + 1)
    for owner in owners:
        assert (folder / f"{owner}.bin").read_bytes() == contents(owner, "w").tobytes()
    mixed = (folder / "mixed.bin").read_bytes()
    assert mixed.endswith(b"".join(contents(k, "rows").tobytes() for k in owners) + b"artifact" * 3000)
    for owner in owners:
        assert contents(owner, "bias")[:28].tobytes() in mixed


def test_each_process_writes_what_it_has(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    failures = []

    def process(rank: int) -> None:
        try:
            run_share(plan_of(rank), output, Share(rank, PROCESSES), workers=2)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(1, PROCESSES + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    finish(plan_of(2), output, PROCESSES)
    assert_whole(tmp_path / "out")


def test_a_small_file_that_is_all_ends_of_shares_is_written(tmp_path: Path) -> None:
    def plan(rank: int) -> Plan:
        parts = [TensorData(f"bias{owner}", piece(rank, owner, "bias")[0, :7]) for owner in (2, 1, 3)]
        return Plan("sample", (OutputFile("", tuple(parts)),))

    for rank in (1, 2, 3):
        run_share(plan(rank), str(tmp_path / "out"), Share(rank, 3))
    finish(plan(2), str(tmp_path / "out"), 3)
    assert (tmp_path / "out").read_bytes() == b"".join(contents(k, "bias")[:28].tobytes() for k in (2, 1, 3))


def test_what_another_process_has_is_asked_of_it_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"w of process 2: tensor 'w'.*held by another process.*process of share 2"):
        execute(plan_of(1), str(tmp_path / "out"), workers=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="process that has no share.*expected owners up to 2.*found 3"):
        run_share(plan_of(1), str(tmp_path / "out"), Share(1, 2))
    run_share(plan_of(1), str(tmp_path / "out"), Share(1, 3))
    with pytest.raises(OutputError, match=r"missing: share 2 of 3 .* share 3 of 3"):
        finish(plan_of(1), str(tmp_path / "out"), 3)


def test_a_chunk_of_several_owners_and_a_wrong_size_are_refused(tmp_path: Path) -> None:
    columns = concatenate([piece(1, 1, "a"), piece(1, 2, "a")], 1)
    plan = Plan("sample", (OutputFile("f", (TensorData("columns", columns),)),))
    with pytest.raises(UsageError, match="'columns': bytes 0 to 8,192 of it are held by several.*'1', '2'"):
        run_share(plan, str(tmp_path / "out"), Share(1, 2))
    with pytest.raises(UsageError, match="another size than planned.*expected 5.*found 4"):
        OwnedSource(1, ("x",), 5, MemorySource(b"four"), "x")


def test_an_object_store_takes_files_of_one_owner() -> None:
    store = ObjectStore()
    with pytest.raises(UsageError, match=r"mixed.bin.*several processes.*owners \[1, 2, 3\]"):
        run_share(plan_of(1), MemoryDestination(store, "m"), Share(1, 3))
    for rank in (2, 1, 3):
        plan = Plan("sample", tuple(file for file in plan_of(rank).files if file.path != "mixed.bin"))
        run_share(plan, MemoryDestination(store, "m"), Share(rank, 3))
    finish(plan, MemoryDestination(store, "m"), 3)
    assert store.objects["2.bin"] == contents(2, "w").tobytes()
