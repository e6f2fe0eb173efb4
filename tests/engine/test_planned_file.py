"""Files of a plan that are made while they are read: the same bytes, from anywhere, as often as somebody likes."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.sample import sample_plan
from tests.support import file_bytes

from anyckpt.blockwise import Tiles
from anyckpt.engine.blocks import cut_all
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.execute import execute
from anyckpt.engine.files import Bytes
from anyckpt.engine.plan import Plan, small_file
from anyckpt.engine.planned_file import Known, PlannedFile
from anyckpt.engine.records import BlockKey, BlockRecord
from anyckpt.errors import FormatError
from anyckpt.storage.read_count import ReadCount


class FirstPass(Destination):
    """Keeps nothing but what a second pass has to know."""

    name = "nowhere"
    in_order = True

    def begin(self, plan: Plan, fingerprint: str, *, share: Share | None, resume: bool) -> None:
        cut = cut_all(plan.files)
        self.known = [Known.of(file, late) for file, late in zip(plan.files, cut.late, strict=True)]

    def records(self, fingerprint: str) -> dict[BlockKey, BlockRecord]:
        return {}

    def write(self, file: int, offset: int, data: Bytes) -> None:
        self.known[file].take(offset, data.tobytes())

    def sync(self, files: Collection[int]) -> None:
        pass

    def record(self, blocks: Mapping[BlockKey, BlockRecord]) -> None:
        for (file, offset), record in blocks.items():
            self.known[file].records[offset] = record

    def seal(self, files: Collection[int]) -> None:
        pass

    def publish(self, manifest: bytes) -> None:
        pass

    def is_published(self, fingerprint: str) -> bool:
        return False

    def close(self, failure: str = "") -> None:
        pass

    def discard(self) -> None:
        pass


def files_of(plan: Plan) -> list[tuple[PlannedFile, Known]]:
    """Every file, when its bytes have been made for the first time."""
    first = FirstPass()
    execute(plan, first)
    cut = cut_all(plan.files)
    made = []
    for blocks, file, known in zip(cut.blocks, plan.files, first.known, strict=True):
        planned = PlannedFile(
            file, blocks, known, Tiles(0), is_far=False, advance=lambda nbytes: None, reads=ReadCount()
        )
        made.append((planned, known))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "data.bin"
    path.write_bytes(np.random.default_rng(3).integers(0, 256, 6_000_000, np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    whole = sample_plan(source)
    return replace(whole, links={}, files=(*whole.files, small_file("empty", "")))


def test_a_file_is_what_a_writer_would_write(plan: Plan) -> None:
    assert any(cut_all(plan.files).late), "parts that wait are in it"
    for file, (planned, known) in zip(plan.files, files_of(plan), strict=True):
        wanted = file_bytes(file)
        assert planned.read() == wanted and planned.read(5) == b""
        assert known.sha256.digest() == hashlib.sha256(wanted).digest()
        assert known.head == wanted[:512]
        planned.seek(0)
        assert io.BufferedReader(planned).read() == wanted  # type: ignore[type-var]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 6_500_000), st.integers(0, 400_000)), max_size=8
    )
)
def test_it_is_read_from_anywhere(made: list[tuple[PlannedFile, bytes]], steps: list[tuple[int, int, int]]) -> None:
    for planned, wanted in made:
        planned.seek(0)
        like = io.BytesIO(wanted)
        for whence, offset, length in steps:
            at = offset if whence == os.SEEK_SET else offset - min(len(wanted), 3_000_000)
            try:
                like.seek(at, whence)
            except ValueError:  # before its start
                like.seek(0)
            planned.seek(at, whence)
            assert planned.tell() == like.tell()
            assert planned.read(length) == like.read(length)


@pytest.fixture(scope="module")
def made(plan: Plan) -> list[tuple[PlannedFile, bytes]]:
    return [
        (planned, file_bytes(file)) for (planned, _), file in list(zip(files_of(plan), plan.files, strict=True))[1:3]
    ]


def test_a_source_that_changes_is_noticed(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data.bin"
    copy.write_bytes(source.read_bytes())
    plan = replace(sample_plan(copy), links={})
    planned, _ = files_of(plan)[1]
    with copy.open("r+b") as stream:
        stream.seek(4_000_000)
        stream.write(b"other bytes")
    with pytest.raises(FormatError, match="came out otherwise when they were made again"):
        planned.read()
