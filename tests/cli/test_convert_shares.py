"""``anyckpt convert --share``."""

from __future__ import annotations

from pathlib import Path

from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.operations.verify import verify

LLAMA = fixture_path("families/llama/hf")
HF = ("--to", "hf", "--max-shard-size", "100KB")


def test_the_command_line_says_what_is_missing(anyckpt: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = anyckpt("convert", LLAMA, output, *HF, "--share", "2/3")
    assert "share 2/3 of hf" in result.out and "missing: 1/3, 3/3" in result.out
    result = anyckpt("convert", LLAMA, output, "--to", "nemo", "--share", "1/3")
    assert "of another conversion" in result.error and "same sources and options" in result.error
    for wrong in ("4/3", "0/3", "x", "1", "1/x", "/"):
        result = anyckpt("convert", LLAMA, output, *HF, "--share", wrong)
        assert "share" in result.error
    anyckpt("convert", LLAMA, output, *HF, "--share", "1/3")
    anyckpt("convert", LLAMA, output, *HF, "--share", "3/3")
    assert verify(output).sound
    again = anyckpt("convert", LLAMA, output, *HF, "--share", "1/3")
    assert "missing" not in again.out
