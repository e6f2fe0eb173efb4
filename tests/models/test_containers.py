"""Every family through every container of Megatron's and NeMo's, and cut for two tensor parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.cases import FAMILIES, facts
from tests.support import fixture_path

import anyckpt
from anyckpt.operations.recut import LayoutRequest


@pytest.mark.parametrize("target", ["nemo", "nemo2", "megatron-core", "megatron-lm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, target: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{name}/hf")
    layout = LayoutRequest(tensor_parallel=2) if target == "megatron-lm" else None
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    anyckpt.convert(source, there, to=target, layout=layout)
    anyckpt.convert(there, tmp_path / "back", to="hf")
    before, after = anyckpt.open(source), anyckpt.open(tmp_path / "back")
    assert facts(after.tensors) == facts(before.tensors)
    assert after.config["model_type"] == before.config["model_type"]
