"""Many ranges asked for at once: what becomes one request, and how many rounds opening and converting take."""

from __future__ import annotations

import io
import tarfile
import threading
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.places import FarSource, FaultySource, Log, MemoryPlace, counting, far, files_below, registered
from tests.support import fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.dtypes import dtype
from anyckpt.engine import blocks, checksum
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, FormatError
from anyckpt.formats import registry
from anyckpt.storage.requests import HELD_BYTES, at_once, coalesced, holding
from anyckpt.storage.source import MemorySource
from anyckpt.storage.tar import read_tar
from anyckpt.tensor import Stored, concatenate, from_array

ROOT = "far://bucket"
MANIFEST = ".anyckpt-manifest.json"

RANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), max_size=40)


@given(RANGES, st.integers(0, 400), st.integers(1, 2000))
def test_every_range_lies_whole_in_one_request(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    requests = coalesced(ranges, gap=gap, most=most)
    inside = [number for request in requests for number in request.ranges]
    assert sorted(inside) == [number for number, (_, length) in enumerate(ranges) if length]
    for request in requests:
        own = [ranges[number] for number in request.ranges]
        assert own == sorted(own)
        assert request.start == min(first for first, _ in own)
        assert request.stop == max(first + length for first, length in own)
        assert request.stop - request.start <= max(most, *(length for _, length in own))
        reached = own[0][0]
        for first, length in own:
            assert first - reached <= gap
            reached = max(reached, first + length)
    for one, following in pairwise(requests):
        apart = following.start - one.stop
        first = ranges[following.ranges[0]]
        assert apart > gap or max(one.stop, sum(first)) - one.start > most


@given(RANGES)
def test_without_limits_all_is_one_request(ranges: list[tuple[int, int]]) -> None:
    assert len(coalesced(ranges, gap=1 << 20, most=1 << 30)) == any(length for _, length in ranges)


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 100)), max_size=20))
def test_many_reads_give_what_single_reads_give(ranges: list[tuple[int, int]]) -> None:
    data = np.random.default_rng(0).bytes(1000)
    log = Log()
    for source in (
        MemorySource(data),
        FarSource(data, "far", log, 0.0),
        FarSource(data, "far", log, 0.0).slice(0, 1000),
    ):
        assert source.read_many(ranges) == [data[first : first + length] for first, length in ranges]


def test_many_reads_are_one_round() -> None:
    log = Log()
    source = FarSource(bytes(64 << 20), "far", log, 0.0)
    with counting(log):
        source.read_many([(number << 20, 100) for number in range(16)])
    assert (log.rounds, len(log.requests), log.nbytes) == (1, 16, 1600)
    with pytest.raises(FormatError, match="outside the file"):
        source.read_many([(0, 1), (64 << 20, 1)])


def test_what_is_held_is_held_for_this_thread_and_no_longer() -> None:
    log = Log()
    source = FarSource(bytes(range(256)), "far", log, 0.0)
    part = source.slice(100, 50)
    with holding([(part, 0, 50), (source, 300, 10)]):
        assert log.requests == [("far", 100, 50)]
        assert source.read(120, 5) == bytes(range(120, 125)) and part.read(0, 50) == bytes(range(100, 150))
        with holding([(source, 110, 10), (source, 0, 10)]):
            assert log.requests[1:] == [("far", 0, 10)]
            assert source.read(2, 2) + source.read(140, 1) == bytes((2, 3, 140))
        other = threading.Thread(target=source.read, args=(120, 5))
        other.start()
        other.join()
        assert log.requests[2:] == [("far", 120, 5)]
        source.read(90, 20)
        assert log.requests[3:] == [("far", 90, 20)]
    source.read(120, 5)
    assert len(log.requests) == 5


def test_a_near_source_is_asked_as_ever() -> None:
    source = MemorySource(bytes(10))
    with holding([(source, 0, 10)]):
        assert source.read(0, 10) == bytes(10)


def test_the_first_failure_ends_the_work() -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 3:
            raise FormatError("no")
        done.append(number)

    with pytest.raises(FormatError, match="no"):
        at_once([lambda number=number: task(number) for number in range(200)], 4)  # type: ignore[misc]
    assert len(done) < 199
    at_once([lambda number=number: done.append(number) for number in range(300, 320)], 64)  # type: ignore[misc]
    assert set(range(300, 320)) <= set(done)


FOLDERS = {
    "legacy/megatron_gpt_tp2_pp2": 4,
    "legacy/megatron_distopt_tp2_dp2": 4,
    "legacy/megatron_gpt_tp1_pp1_release": 3,
    "deepspeed/zero3": 10,
    "fsdp/hsdp_4": 3,
    "families/qwen2_moe/hf": 3,
    "mcore/gpt_opt_plain/ckpt": 3,
    "mcore/zarr_v012_w2_flat/ckpt": 3,
    "nemo/nemo2_llama_spm/model": 6,
    "nemo/lightning_tp/m-step=2.ckpt": 3,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_rounds_of_opening(name: str) -> None:
    """One after another, however many files there are."""
    folder, log = fixture_path(name), Log()
    with counting(log), registered("far", MemoryPlace(ROOT, files_below(folder), far(log))):
        opened = anyckpt.open(ROOT)
        assert log.rounds <= FOLDERS[name], log.requests
    wanted = anyckpt.open(folder)
    assert opened.warnings == wanted.warnings and opened.tensors.keys() == wanted.tensors.keys()
    assert [(one.name, one.times) for one in opened.calls] == [(one.name, one.times) for one in wanted.calls]


@pytest.mark.parametrize("name", ["mcore/gpt_moe_opt_chained_ep2/ckpt", "legacy/megatron_gpt_tp2_pp2"])
@pytest.mark.parametrize("manifest", [False, True])
def test_rounds_of_verifying(name: str, manifest: bool, tmp_path: Path) -> None:
    """Checksums of many small records, or digests of many small tensors."""
    folder = fixture_path(name)
    if manifest:
        anyckpt.convert(folder, tmp_path / "out", to="dcp")
        folder = tmp_path / "out"
    wanted = anyckpt.verify(folder)
    log = Log()
    with counting(log), registered("far", MemoryPlace(ROOT, files_below(folder), far(log))):
        found = anyckpt.verify(ROOT)
    assert found.checked == wanted.checked and len(found.problems) == len(wanted.problems)
    assert log.rounds <= 16


def test_damage_is_found_from_afar(tmp_path: Path) -> None:
    anyckpt.convert(fixture_path("families/qwen2_moe/hf"), tmp_path / "out", to="dcp")
    files = files_below(tmp_path / "out")
    name = next(name for name in files if name.endswith(".distcp"))
    damaged = bytearray(files[name])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(damaged)
    wanted = anyckpt.verify(tmp_path / "out")
    with registered("far", MemoryPlace(ROOT, {**files, name: bytes(damaged)}, far(Log()))):
        found = anyckpt.verify(ROOT)
    there = [one.where.replace(str(tmp_path / "out"), ROOT) for one in wanted.problems]
    assert there and [one.where for one in found.problems] == there
    assert found.checked == wanted.checked


def test_shards_are_opened_at_once(tmp_path: Path) -> None:
    anyckpt.convert(fixture_path("families/qwen2_moe/hf"), tmp_path / "hf", to="hf", max_shard_size=3000)
    files = files_below(tmp_path / "hf")
    shards = sum(name.endswith(".safetensors") for name in files)
    log = Log()
    with counting(log), registered("far", MemoryPlace(ROOT, files, far(log))):
        anyckpt.open(ROOT)
    assert shards > 16 and log.rounds <= 4 + shards // 16


@pytest.mark.parametrize("generation", ["zip", "legacy"])
def test_a_torch_file_is_opened_in_a_few_rounds(generation: str) -> None:
    path = fixture_path(f"legacy/zoo_dtypes/{generation}.pt")
    log = Log()
    with counting(log), registered("far", MemoryPlace(ROOT, {path.name: path.read_bytes()}, far(log))):
        opened = anyckpt.open(f"{ROOT}/{path.name}")
    assert log.rounds <= 4 and opened.tensors.keys() == anyckpt.open(path).tensors.keys()


def test_small_members_of_an_archive_are_found_in_one_round() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(100):
            info = tarfile.TarInfo(f"folder/member-{number}-{'x' * (number * 2)}")
            info.size = number
            archive.addfile(info, io.BytesIO(bytes([number]) * number))
        info = tarfile.TarInfo("large")
        info.size = 1 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
        archive.addfile(tarfile.TarInfo("last"))
    log = Log()
    found = read_tar(FarSource(out.getvalue(), "far", log, 0.0))
    wanted = read_tar(MemorySource(out.getvalue()))
    assert len(log.requests) <= 4 and list(found) == list(wanted)
    assert all(found[name].source.read_all() == member.source.read_all() for name, member in wanted.items())


CONVERSIONS = [
    ("mcore/gpt_opt_plain/ckpt", "dcp"),
    ("mcore/dcp_hsdp_tp_w4/ckpt", "torch"),
    ("legacy/megatron_gpt_tp2_pp2", "hf"),
    ("families/qwen2_moe/hf", "megatron-core"),
    ("deepspeed/zero2", "safetensors"),
]


@pytest.mark.parametrize(("name", "to"), CONVERSIONS)
def test_the_same_bytes_are_written_from_afar(name: str, to: str, tmp_path: Path) -> None:
    folder, log = fixture_path(name), Log()
    anyckpt.convert(folder, tmp_path / "near", to=to)
    with registered("far", MemoryPlace(ROOT, files_below(folder), far(log, 0.0))):
        anyckpt.convert(ROOT, tmp_path / "far", to=to)
    near, away = (
        files_below(path) if path.is_dir() else path.read_bytes() for path in (tmp_path / "near", tmp_path / "far")
    )
    for written in (near, away):
        if isinstance(written, dict):
            written.pop(MANIFEST)
    assert near == away


def test_a_block_takes_one_round_however_many_tensors_fill_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        f"layers.{number}.w": from_array(rng.standard_normal((64, 64), dtype=np.float32)) for number in range(400)
    }
    source = write_plan(Plan("safetensors", (OutputFile("", safetensors_parts(tensors)),)), tmp_path / "a.safetensors")
    anyckpt.convert(source, tmp_path / "dcp", to="dcp")
    anyckpt.convert(tmp_path / "dcp", tmp_path / "near.safetensors", to="safetensors")
    log = Log()
    with counting(log), registered("far", MemoryPlace(ROOT, files_below(tmp_path / "dcp"), far(log))):
        anyckpt.open(ROOT)
        opening, log.rounds = log.rounds, 0
        done = anyckpt.convert(ROOT, tmp_path / "far.safetensors", to="safetensors", workers=1)
    assert log.rounds <= opening + -(-done.bytes_written // (4 << 20))
    assert (tmp_path / "far.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()


def test_no_item_is_opened_by_two_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of a few kinds, of which each tells where the elements of the others lie."""
    rng = np.random.default_rng(2)
    tensors = {f"w{number}": from_array(rng.standard_normal((96, 32 + number % 3))) for number in range(90)}
    source = write_plan(Plan("safetensors", (OutputFile("", safetensors_parts(tensors)),)), tmp_path / "a.safetensors")
    anyckpt.convert(source, tmp_path / "dcp", to="dcp")
    files = files_below(tmp_path / "dcp")
    for module in (blocks, checksum):
        monkeypatch.setattr(module, "CHUNK_BYTES", 8 << 10)
    counts = []
    for workers in (1, 8):
        log = Log()
        place = MemoryPlace(ROOT, files, lambda data, name, log=log: FarSource(data, name, log, 0.002, at_once=1))
        place.is_far = False
        with registered("far", place):
            anyckpt.convert(ROOT, tmp_path / f"out{workers}.pt", to="torch", workers=workers, memory=1 << 28)
        counts.append(Counter(log.requests))
    assert [sum(count - 1 for count in found.values()) for found in counts][1] <= 3 * 3  # of the first of each kind
    assert counts[0].total() == counts[1].total()


def test_memory_does_not_grow_with_what_a_read_needs() -> None:
    """Columns of a wide matrix: a few bytes of each of many rows, far from one another."""
    rows, width = 600, 100_000
    source = FarSource(bytes(rows * width), "far", Log(), 0.0)
    column = Stored(source, 0, dtype("uint8"), (rows, width)).narrow(1, 0, 70_000)
    other = Stored(source, 0, dtype("uint8"), (rows, width)).narrow(1, 70_000, 30_000)
    whole = concatenate([other, column], 1)
    out = np.empty(whole.size, np.uint8)
    tracemalloc.start()
    whole.fill(0, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not out.any() and whole.size > 4 * HELD_BYTES and peak < 4 * HELD_BYTES


@pytest.mark.parametrize("fault", ["fails", "short", "changed"])
@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_a_source_that_fails(fault: str, after: int, tmp_path: Path) -> None:
    """A named error, and nothing left behind."""
    told = {"fails": "cannot be read at byte .*: Connection reset", "short": "became shorter", "changed": "changed"}
    log = Log()
    files = files_below(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    place = MemoryPlace(ROOT, files, lambda data, name: FaultySource(data, name, log, fault, after))
    with registered("far", place), pytest.raises(AnyckptError, match=told[fault]) as caught:
        anyckpt.convert(ROOT, tmp_path / "out", to="hf")
    assert ROOT in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_of_far_tensors() -> None:
    folder = fixture_path("quant/nvfp4_b/hf")
    with registered("far", MemoryPlace(ROOT, files_below(folder), far(Log(), 0.0))):
        away = registry.read(ROOT).tensors
        assert {n: sha256_of(t) for n, t in away.items()} == {
            n: sha256_of(t) for n, t in registry.read(folder).tensors.items()
        }
