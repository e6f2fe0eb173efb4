"""Experts' optimizer: one of its own with expert parallelism, otherwise with the rest; through formats and layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.models.dialects import spellings
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.optimizer.read import with_optimizer
from tests.formats.megatron_lm_files import FILE, root_of
from tests.support import fixture_path, sha256_of

SOURCE = "mcore/gpt_moe_opt_chained_ep2/ckpt"
ARGUMENTS = {
    "num_layers": 1, "num_attention_heads": 4, "num_query_groups": 2, "group_query_attention": True, "num_experts": 2,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
"""What the run's arguments in the fixture leave out."""


def state_of(path: Path) -> OptimizerState:
    found = with_optimizer(open_checkpoint(path)).optimizer
    assert found is not None
    return found()


def digests(path: Path) -> dict[str, dict[str, str]]:
    slots = {slot: spellings.to_hub_names(own)[0] for slot, own in state_of(path).slots.items()}
    return {slot: {name: sha256_of(tensor) for name, tensor in own.items()} for slot, own in slots.items()}


def ranks(tmp_path: Path, experts: int) -> Path:
    out = tmp_path / f"ranks {experts}"
    source = open_checkpoint(fixture_path(SOURCE))
    described = replace(source, config={**source.config, **ARGUMENTS})
    convert(described, out, to="megatron-lm", optimizer="keep", layout=LayoutRequest(expert_parallel=experts))
    return out


@pytest.mark.parametrize("experts", [1, 2])
def test_rank_files_have_as_many_optimizers_as_megatron_asks_for(experts: int, tmp_path: Path) -> None:
    out = ranks(tmp_path, experts)
    folders = sorted(out.glob(f"iter_*/*/{FILE}"))
    assert len(folders) == experts
    for path in folders:
        optimizer: Any = root_of(path)["optimizer"]
        assert isinstance(optimizer, list) == (experts == 2)
    assert digests(out) == digests(fixture_path(SOURCE))


def test_distributed_checkpoints_have_them_as_asked_for(tmp_path: Path) -> None:
    source = open_checkpoint(fixture_path(SOURCE))
    for experts in (1, 2):
        for asked in (None, 1, 2):
            out = tmp_path / f"core {experts} {asked}"
            request = LayoutRequest(expert_parallel=asked)
            done = convert(ranks_once(tmp_path, experts), out, to="megatron-core", optimizer="keep", layout=request)
            core: Checkpoint = open_checkpoint(out)
            apart = (asked or experts) == 2
            assert any("experts have an optimizer of their own" in note for note in done.notes) == apart
            assert any("experts share the others' optimizer" in note for note in done.notes) != apart
            numbers = [group["is_expert_parallel"] for group in groups_of(core)]
            assert numbers == ([False, False, True] if apart else [False, False])
            assert digests(out) == digests(fixture_path(SOURCE))
    assert [group["is_expert_parallel"] for group in groups_of(source)] == [False, False, True]


def ranks_once(tmp_path: Path, experts: int) -> Path:
    out = tmp_path / f"ranks {experts}"
    return out if out.exists() else ranks(tmp_path, experts)


def groups_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    optimizer = checkpoint.objects["optimizer"]
    parts = [optimizer] if "optimizer" in optimizer else [optimizer[key] for key in sorted(optimizer)]
    return [group for part in parts for group in part["optimizer"]["param_groups"]]
