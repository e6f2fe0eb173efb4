"""Blocks of a file that are filled ahead: read while others are written, in their order, never more than asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.memory_destination import MemoryDestination, ObjectStore
from tests.engine.sample import shrink_blocks
from tests.places import FarSource, Log

from anyckpt.engine import execute
from anyckpt.engine.ahead import filled
from anyckpt.engine.blocks import Block
from anyckpt.engine.files import BlockBuffer, Bytes
from anyckpt.engine.filling import Filling
from anyckpt.engine.plan import OutputFile, Plan, SourceData
from anyckpt.errors import UnreachableError

NBYTES = 100_000
DATA = np.random.default_rng(5).bytes(NBYTES)


class Fake:
    """Fills made-up blocks, and notes how many are in hand."""

    def __init__(self, fails_at: int = -1) -> None:
        self._lock = threading.Lock()
        self._fails_at = fails_at
        self.begun: list[int] = []

    def __call__(self, block: Block, buffer: BlockBuffer) -> Filling:
        with self._lock:
            self.begun.append(block.offset)
        if block.offset == self._fails_at:
            raise UnreachableError("cannot be reached", path=str(block.offset))
        memory = buffer.at(0, 8)
        memory[:] = np.frombuffer(block.offset.to_bytes(8, "little"), np.uint8)
        return Filling(block, OutputFile("", ()), memory)


@given(st.integers(0, 12), st.integers(-1, 6), st.integers(-1, 11))
def test_blocks_come_in_their_order(count: int, ahead: int, fails_at: int) -> None:
    fill, got = Fake(fails_at), []
    blocks = [Block(0, number, 1, ()) for number in range(count)]
    try:
        for one in filled(blocks, fill, None if ahead < 0 else lambda: ahead):
            assert int.from_bytes(one.memory.tobytes(), "little") == one.block.offset
            got.append(one.block.offset)
            assert len(fill.begun) <= len(got) + max(0, ahead)
    except UnreachableError as error:
        assert error.path == str(fails_at)
    assert got == list(range(fails_at if 0 <= fails_at < count else count))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("anyckpt-ahead")]


class Watched(Log):
    """A log that can be waited at."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def add(self, name: str, offset: int, length: int) -> None:
        with self._more:
            super().add(name, offset, length)
            self._more.notify_all()

    def wait_for_more(self, start: str, nbytes: int) -> None:
        """Wait until more than so many bytes are asked for, of sources whose names begin so."""

        def come() -> bool:
            return sum(length for name, _, length in self.requests if name.startswith(start)) > nbytes

        with self._more:
            assert self._more.wait_for(come, 20)


def far_plan(make: Callable[[str], Any], files: int = 1) -> Plan:
    parts = [tuple(SourceData(make(f"far://{file}/{part}")) for part in range(3)) for file in range(files)]
    return Plan("test", tuple(OutputFile(str(number), own) for number, own in enumerate(parts)))


@pytest.mark.parametrize("files", [1, 3])
def test_what_comes_next_is_read_while_a_block_is_written(files: int) -> None:
    """Writing waits until the next block has been asked for, which it never would be if reading waited for writing."""
    shrink_blocks(8192)
    log = Watched()
    plan = far_plan(lambda name: FarSource(DATA, name, log, 0.0), files)

    class Waiting(MemoryDestination):
        waited = 0

        def write(self, file: int, offset: int, data: Bytes) -> None:
            if offset + len(data) < plan.files[file].nbytes:
                self.waited += 1
                log.wait_for_more(f"far://{file}/", offset + len(data))
            super().write(file, offset, data)

    store = ObjectStore()
    place = Waiting(store, "memory")
    execute.execute(plan, place, workers=8)
    assert place.waited > 20
    assert store.objects["0"] == DATA * 3
    assert log.nbytes == files * 3 * NBYTES


def test_a_large_file_is_read_ahead_with_small_ones_beside_it() -> None:
    """Which are done at once, and leave it their threads' memory."""
    shrink_blocks(8192)
    going, most = set(), 0

    class Counting(FarSource):
        def _read_into(self, offset: int, buffer: memoryview) -> None:
            nonlocal most
            going.add(offset)
            most = max(most, len(going))
            super()._read_into(offset, buffer)
            going.discard(offset)

    log = Log()
    small = [OutputFile(f"{number}", (SourceData(FarSource(b"x", "far", log, 0.0)),)) for number in range(5)]
    large = OutputFile("large", (SourceData(Counting(DATA * 3, "far://large", log, 0.005)),))
    store = ObjectStore()
    execute.execute(Plan("test", (*small, large)), MemoryDestination(store, "memory"), workers=4)
    assert store.objects["large"] == DATA * 3
    assert most == 4


@pytest.mark.parametrize("parts", [1, 2])
def test_one_request_brings_a_block_to_where_it_belongs(parts: int) -> None:
    """Of several, what they bring is held until all are there."""
    shrink_blocks(8192)
    straight = []

    class Seen(FarSource):
        def _read_into(self, offset: int, buffer: memoryview) -> None:
            straight.append(not isinstance(buffer.obj, bytearray))
            super()._read_into(offset, buffer)

    sources = [Seen(DATA[: 4096 // parts], f"far://{number}", Log(), 0.0) for number in range(parts)]
    store = ObjectStore()
    plan = Plan("test", (OutputFile("file", tuple(map(SourceData, sources))),))
    execute.execute(plan, MemoryDestination(store, "memory"), workers=1)
    assert store.objects["file"] == DATA[: 4096 // parts] * parts
    assert straight == [parts == 1] * parts


def test_a_source_that_fails_ahead_fails_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(8192)
    log = Log()

    class Failing(FarSource):
        def _read_into(self, offset: int, buffer: memoryview) -> None:
            if offset <= 70_000 < offset + len(buffer) and self.name.endswith("1"):
                raise UnreachableError("cannot be reached", path=self.name)
            super()._read_into(offset, buffer)

    store = ObjectStore()
    with pytest.raises(UnreachableError, match="far://0/1"):
        execute.execute(far_plan(lambda name: Failing(DATA, name, log, 0.0)), MemoryDestination(store, "m"), workers=8)
    assert store.objects == {}
