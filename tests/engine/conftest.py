"""What tests of the engine begin with, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.sample import make_source

from anyckpt.engine import blocks, checksum, files, run


@pytest.fixture(autouse=True)
def restored_block_sizes() -> Iterator[None]:
    """Put back what ``shrink_blocks`` changes."""
    before = (blocks.CHUNK_BYTES, run._SYNC_EVERY, files._DIRECT_MINIMUM)
    yield
    for module in (blocks, checksum, files):
        module.CHUNK_BYTES = before[0]  # type: ignore[attr-defined]
    run._SYNC_EVERY, files._DIRECT_MINIMUM = before[1:]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source.bin", 256 * 1024)
