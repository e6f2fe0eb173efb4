"""Conversions into a bucket through a network that fails in every way that it can, at any request."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("moto")
pytestmark = pytest.mark.peer

from tests.places import files_below  # noqa: E402
from tests.servers import Asked, Proxy, S3Server  # noqa: E402
from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.engine import growing  # noqa: E402
from anyckpt.errors import AnyckptError  # noqa: E402
from anyckpt.storage import objects  # noqa: E402
from anyckpt.storage.remote import requesting, stores  # noqa: E402

ROUNDS = int(os.environ.get("ANYCKPT_ROUNDS", "20"))
FIRST = int(os.environ.get("ANYCKPT_FIRST_ROUND", "0"))
"""By hand, ``ANYCKPT_ROUNDS=500`` does so many, and ``ANYCKPT_FIRST_ROUND=500`` others."""

FAULTS = (
    "reset",
    "503 SlowDown",
    "500 InternalError",
    "slow",
    "cut",
    "done reset",
    "done 500 InternalError",
    "done 503",
)
_TOLD_LATE = "200 InternalError"
"""Of an upload that is to be completed, S3 may tell an error when its answer has begun."""

OUTPUTS = ("hf", "megatron-core", "dcp", "nemo", "torch", "safetensors")
PART = 40_000
SOURCE, OTHER = "families/llama/hf", "families/qwen2/hf"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files go up in several parts."""
    from moto.s3 import models

    for module in (objects, growing):
        monkeypatch.setattr(module, "PART_BYTES", PART)
    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", PART)
    monkeypatch.setattr(stores, "RETRIES", 2)
    monkeypatch.setattr(requesting, "TRIES", 2)


def network(chance: random.Random) -> tuple[float, frozenset[str], int]:
    """How often requests fail, in which ways, and from which on all do."""
    ways = frozenset(chance.sample(FAULTS, chance.randint(1, len(FAULTS))))
    return chance.choice((0.02, 0.1, 0.3, 0.6)), ways, chance.choice((10**9, chance.randrange(3, 60)))


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """What a reader takes for a checkpoint."""
    return {name: data for name, data in files.items() if ".anyckpt-" not in name}


@pytest.mark.parametrize("seed", range(FIRST, FIRST + ROUNDS))
def test_what_is_written_is_whole_or_none_and_can_be_finished(
    seed: int, s3: S3Server, proxy: Proxy, parts: None, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    to = chance.choice(OUTPUTS)
    s3.bucket("models")
    output = "s3://models/out" + (f".{to}" if to in ("nemo", "torch", "safetensors") else "")
    anyckpt.convert(fixture_path(SOURCE), tmp_path / output.rpartition("/")[2], to=to)
    wanted = files_below(tmp_path)
    before: dict[str, bytes] = {}
    if chance.random() < 0.3:
        anyckpt.convert(fixture_path(OTHER), output, to=to)
        before = s3.files("models")
    often, ways, end = network(chance)

    def fault(number: int, asked: Asked) -> str | None:
        if number < end and chance.random() >= often:
            return None
        completes = asked.method == "POST" and "uploadId=" in asked.path
        return chance.choice([*sorted(ways), *([_TOLD_LATE] if completes else [])])

    proxy.asked.clear()
    proxy.fault = fault
    failed = False
    try:
        anyckpt.convert(fixture_path(SOURCE), output, to=to, overwrite=True)
    except AnyckptError:
        failed = True
    proxy.fault = lambda number, asked: None
    found = s3.files("models")
    if not failed:  # where the network failed at the very end, a claim may be left, which the next writer removes
        assert {name: data for name, data in found.items() if ".anyckpt-partial/" not in name} == wanted
        return
    with suppress(AnyckptError):
        anyckpt.open(output)
        assert weights(found) in (weights(wanted), weights(before))
    anyckpt.convert(fixture_path(SOURCE), output, to=to, resume=True, overwrite=bool(before))
    assert s3.files("models") == wanted
