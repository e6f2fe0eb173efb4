"""transformers loads experts in either form that is written as the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.proofs import samples  # noqa: E402
from tests.support import write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral", "qwen3.5-moe", "glm-5"])
def test_stacked_experts(name: str, tmp_path: Path) -> None:
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(samples()[name].open()[0], WriteOptions()), tmp_path / "each")
    anyckpt.convert(path, tmp_path / "stacked", to="hf", experts="stacked")
    each, stacked = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
        for folder in (path, tmp_path / "stacked")
    )
    assert each.keys() == stacked.keys()
    assert all(torch.equal(each[key], stacked[key]) for key in each)
