"""What is said of files that are larger than asked, and of which of them another limit would help."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt

LLAMA = fixture_path("families/llama/hf")


@pytest.mark.parametrize("to", ["hf", "dcp", "megatron-core", "nemo2"])
@pytest.mark.parametrize("limit", [100, 1000, 5_000, 20_000])
def test_a_limit_that_files_keep_to_is_not_said_to_be_missed(to: str, limit: int, tmp_path: Path) -> None:
    done = anyckpt.convert(LLAMA, tmp_path / "out", to=to, max_shard_size=limit, dry_run=True)
    assert not any("does not divide" in note for note in done.notes)
    whole = anyckpt.convert(LLAMA, tmp_path / "out", to=to, dry_run=True)
    assert len(done.files) > len(whole.files)
    largest = max(tensor.nbytes for tensor in anyckpt.open(LLAMA).tensors.values())
    assert any("larger than the --max-shard-size" in note for note in done.notes) == (limit < largest)
    if to == "hf" and limit < largest:
        assert any(f"of {largest:,} bytes" in note for note in done.notes)


@pytest.mark.parametrize("to", ["torch", "safetensors", "lightning", "nemo"])
def test_a_format_of_one_file_says_so(to: str, tmp_path: Path) -> None:
    done = anyckpt.convert(LLAMA, tmp_path / "out", to=to, max_shard_size=1000, dry_run=True)
    assert any(f"does not divide a {to} checkpoint" in note for note in done.notes)
    assert not any("alone in a file" in note for note in done.notes)
