"""Experts one by one or stacked: what transformers reads is a choice where Hugging Face's names are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.cases import facts
from tests.models.proofs import samples
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.errors import UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read

MIXED = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "qwen3-next", "qwen3.5-moe", "glm-5")


def stored(name: str, folder: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(samples()[name].open()[0], WriteOptions()), folder)


@pytest.mark.parametrize("through", [None, "megatron-core"])
@pytest.mark.parametrize("name", MIXED)
def test_stacked_and_apart(name: str, through: str | None, tmp_path: Path) -> None:
    path = stored(name, tmp_path / "hf")
    between = path
    if through is not None:
        anyckpt.convert(path, tmp_path / "between", to=through)
        between = tmp_path / "between"
    anyckpt.convert(between, tmp_path / "stacked", to="hf", experts="stacked")
    together = read(str(tmp_path / "stacked")).tensors
    one = next(key for key in together if key.endswith("mlp.experts.gate_up_proj"))
    assert together[one].ndim == 3
    assert not any(".experts.0." in key for key in together)
    anyckpt.convert(tmp_path / "stacked", tmp_path / "each", to="hf", experts="each")
    before = read(str(path))
    assert facts(read(str(tmp_path / "each")).tensors) == facts(before.tensors)
    anyckpt.convert(tmp_path / "stacked", tmp_path / "same", to="hf")
    assert facts(read(str(tmp_path / "same")).tensors) == facts(together), "as it is stored, if nothing is asked for"


def test_names_that_are_asked_for(tmp_path: Path) -> None:
    path = fixture_path("families/qwen3_moe/hf")
    anyckpt.convert(path, tmp_path / "a", to="safetensors", names="hf", experts="stacked")
    assert any(key.endswith("mlp.experts.down_proj") for key in read(str(tmp_path / "a")).tensors)


@pytest.mark.parametrize(
    ("name", "to", "experts", "message"),
    [
        ("llama", "hf", "stacked", "experts of family llama have one form"),
        ("gpt_oss", "hf", "each", "experts of family gpt-oss have one form"),
        ("qwen3_moe", "megatron-core", "each", "--experts says in which form Hugging Face's names"),
        ("qwen3_moe", "hf", "fused", "unknown value for experts"),
    ],
)
def test_what_means_nothing(name: str, to: str, experts: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        anyckpt.convert(fixture_path(f"families/{name}/hf"), tmp_path / "out", to=to, experts=experts)
