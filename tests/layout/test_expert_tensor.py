"""Rank files whose expert tensor parallel size does not divide the tensor parallel size."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyckpt.cli import run
from anyckpt.formats import registry
from anyckpt.operations.reshard import reshard
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from tests.support import fixture_path

EXPERTS = "legacy/megatron_moe_tp2_ep2"


def test_there_and_back_through_files(tmp_path: Path) -> None:
    """Four tensor ranks, four expert ranks, experts in three parts: twelve ranks, each with a folder of its own."""
    layout = LayoutRequest(tensor_parallel=4, expert_parallel=4, expert_tensor_parallel=3)
    reshard(fixture_path(EXPERTS), tmp_path / "out", layout=layout)
    folders = sorted(path.name for path in (tmp_path / "out").glob("*/mp_rank_*"))
    assert len(folders) == 12
    opened = registry.read(tmp_path / "out")
    assert opened.config["expert_tensor_parallel_size"] == 3
    expected, found = open_checkpoint(fixture_path(EXPERTS)).weights(), open_checkpoint(tmp_path / "out").weights()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.numpy().tobytes() == found[name].numpy().tobytes(), name


def test_what_folders_cannot_tell_apart_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(fixture_path(EXPERTS))
    assert run(["reshard", source, str(tmp_path / "out"), "--tp", "2", "--ep", "2", "--etp", "4"]) == 2
    error = capsys.readouterr().err
    assert "ranks 0 and 2 have the same" in error and "megatron-core" in error
    assert run(["convert", source, str(tmp_path / "out"), "--to", "megatron-core"]) == 0
