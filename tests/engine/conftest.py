"""What every test of the engine leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anyckpt.engine import blocks, checksum, files, run


@pytest.fixture(autouse=True)
def restored_block_sizes() -> Iterator[None]:
    """The sizes that ``sample.shrink_blocks`` changes."""
    before = (blocks.CHUNK_BYTES, run._SYNC_EVERY, files._DIRECT_MINIMUM)
    yield
    for module in (blocks, checksum, files):
        module.CHUNK_BYTES = before[0]  # type: ignore[attr-defined]
    run._SYNC_EVERY, files._DIRECT_MINIMUM = before[1:]
