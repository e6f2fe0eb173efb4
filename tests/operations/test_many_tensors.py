"""Planning and writing many tensors takes work in proportion to their number: calls are counted, not seconds."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import anyckpt

FEW, TIMES = 150, 4
ALLOWED = 1.15
"""How much more than in proportion: sorting, and what is done for every so many."""


def many(path: Path, count: int) -> Path:
    header = {
        f"layers.{number}.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16 * number, 16 * number + 16]}
        for number in range(count)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * count))
    return path


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called meanwhile, in every thread, of Python and of C."""
    counted = [0]

    def note(frame: object, event: str, argument: object) -> None:
        counted[0] += event in ("call", "c_call")

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]
    return counted[0]


MOST_CALLS = {"dcp": 800, "torch": 730, "safetensors": 280}
"""For each tensor of 16 bytes; a twentieth to a tenth above what it takes."""


@pytest.mark.parametrize("to", MOST_CALLS)
def test_a_small_tensor_takes_no_more_calls_than_it_did(to: str, tmp_path: Path) -> None:
    few, more = (many(tmp_path / f"{count}.safetensors", count) for count in (FEW, 2 * FEW))

    def convert(source: Path, name: str) -> int:
        return calls_of(lambda: anyckpt.convert(source, tmp_path / name, to=to, workers=1))

    convert(few, "first")
    assert (convert(more, "more") - convert(few, "few")) / FEW < MOST_CALLS[to]


@pytest.mark.parametrize("to", ["dcp", "torch", "safetensors", "lightning"])
def test_four_times_as_many_take_four_times_as_much(to: str, tmp_path: Path) -> None:
    few, more = (many(tmp_path / f"{count}.safetensors", count) for count in (FEW, FEW * TIMES))

    def convert(source: Path, name: str) -> int:
        return calls_of(lambda: anyckpt.convert(source, tmp_path / name, to=to, workers=1))

    convert(few, "first")  # which imports
    assert convert(more, "more") < ALLOWED * TIMES * convert(few, "few")
