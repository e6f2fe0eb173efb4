"""Random access to compressed streams: right bytes from anywhere, bounded memory, and no lie believed."""

from __future__ import annotations

import gzip
import random
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anyckpt.storage.inflate as inflate
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.storage.inflate import GZIP, RAW, InflatedSource
from anyckpt.storage.source import MemorySource


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, RAW)
    return compressor.compress(data) + compressor.flush()


def mixed(nbytes: int) -> bytes:
    """Half noise, half runs, so that the compressed and the plain positions drift apart."""
    noise = random.Random(7)
    blocks = [noise.randbytes(1000) if i % 2 else bytes([i % 251]) * 1000 for i in range(nbytes // 1000 + 1)]
    return b"".join(blocks)[:nbytes]


DATA = mixed(300_000)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "_SPACING", 10_000)
    monkeypatch.setattr(inflate, "_KEPT", 8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 5000)), min_size=1, max_size=12))
def test_reads_anywhere_in_any_order(ranges: list[tuple[int, int]]) -> None:
    source = InflatedSource(MemorySource(raw_deflate(DATA)), len(DATA), RAW)
    for offset, length in ranges:
        length = min(length, len(DATA) - offset)
        assert source.read(offset, length) == DATA[offset : offset + length]


def test_keeps_few_states_and_still_goes_back() -> None:
    source = InflatedSource(MemorySource(raw_deflate(DATA)), len(DATA), RAW)
    assert source.read(0, len(DATA)) == DATA
    assert len(source._kept) <= 8
    assert len(source._kept) >= 4
    assert source.read(250_000, 10) == DATA[250_000:250_010]
    assert source.read(5, 10) == DATA[5:15]


def test_finds_the_size_of_gzip_of_several_members_and_ignores_padding() -> None:
    packed = gzip.compress(DATA[:100_000]) + gzip.compress(DATA[100_000:]) + bytes(512)
    source = InflatedSource(MemorySource(packed), None, GZIP, "a.nemo")
    assert source.size == len(DATA)
    assert source.read(99_990, 20) == DATA[99_990:100_010]
    assert source.read(0, 100) == DATA[:100]
    assert source.name == "a.nemo"


def test_is_read_by_many_threads() -> None:
    source = InflatedSource(MemorySource(raw_deflate(DATA)), len(DATA), RAW)
    wrong: list[int] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(20):
            at = choose.randrange(len(DATA) - 100)
            if source.read(at, 100) != DATA[at : at + 100]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kept", [0, 1, 10, 1000])
def test_a_truncated_stream_is_an_error(kept: int) -> None:
    packed = raw_deflate(DATA)[:kept]
    with pytest.raises(FormatError):
        InflatedSource(MemorySource(packed), min(len(DATA), kept * 1000 + 1), RAW).read(
            0, min(len(DATA), kept * 1000 + 1)
        )
    with pytest.raises(FormatError, match="truncated"):
        InflatedSource(MemorySource(gzip.compress(DATA)[:kept]), None, GZIP)


def test_a_damaged_stream_is_an_error() -> None:
    packed = bytearray(gzip.compress(DATA))
    packed[5000] ^= 0xFF
    with pytest.raises(FormatError, match="damaged"):
        InflatedSource(MemorySource(packed), None, GZIP)


def test_a_size_that_is_too_small_or_too_large_is_an_error() -> None:
    packed = MemorySource(raw_deflate(DATA))
    with pytest.raises(FormatError, match="more than it states"):
        InflatedSource(packed, len(DATA) - 1, RAW).read(0, len(DATA) - 1)
    with pytest.raises(FormatError, match="less than it states"):
        InflatedSource(packed, len(DATA) + 1, RAW).read(0, len(DATA) + 1)


def test_an_impossible_size_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UnsafeError, match="cannot hold"):
        InflatedSource(MemorySource(raw_deflate(DATA)), 1 << 50, RAW)


def test_a_bomb_costs_no_memory_until_it_is_read() -> None:
    packed = raw_deflate(bytes(50 << 20))
    source = InflatedSource(MemorySource(packed), 50 << 20, RAW)
    assert source.read((50 << 20) - 3, 3) == bytes(3)
    assert len(source._kept) <= 8
