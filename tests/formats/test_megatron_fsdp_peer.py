"""Checkpoints as Megatron-LM saves Megatron-FSDP's models: plain DCP of one nested state, saved here by torch itself.

Megatron-FSDP needs a GPU; the state is made as ``training/checkpointing.py`` and ``fsdp_dtensor_checkpoint.py`` of core
0.16 make it: ``args`` and ``iteration`` beside ``model``, global numbers of layers and experts, gated projections in
halves, optimizer state by name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from tests.support import fixture_path  # noqa: E402

from anyckpt.cli import run  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.models.dialects.rank_names import part_norms  # noqa: E402
from anyckpt.operations.convert import convert  # noqa: E402
from anyckpt.operations.steps.joining import open_checkpoint  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402

pytestmark = pytest.mark.peer

DENSE, EXPERTS = "megatron_gpt_tp2_pp2", "megatron_moe_tp2_ep2"


def as_torch(tensor: Any) -> Any:
    raw = torch.from_numpy(tensor.numpy().view(np.uint8).copy().reshape(-1))
    return raw.view(getattr(torch, tensor.dtype.name)).reshape(tensor.shape)


def model_state(fixture: str, *, sequential: bool, prefix: str) -> dict[str, Any]:
    weights = open_checkpoint(fixture_path(f"legacy/{fixture}")).weights()
    state: dict[str, Any] = {}
    for name, tensor in (part_norms(weights) if sequential else weights).items():
        value = as_torch(tensor)
        expert = name[-1] if ".experts.linear" in name else ""
        stem = name[: -len(expert)] if expert else name
        halves = (
            {"_w": value.chunk(2)[0].clone(), "_v": value.chunk(2)[1].clone()}
            if ".linear_fc1.weight" in name
            else {"": value}
        )
        for suffix, part in halves.items():
            if expert and sequential:
                stored = stem.replace(".experts.", f".experts.local_experts.{expert}.") + suffix
            else:
                stored = f"{stem}{expert}{suffix}"
            state[prefix + stored] = part
    return state


def save(folder: Path, fixture: str, *, sequential: bool, prefix: str = "") -> Path:
    config = registry.read(fixture_path(f"legacy/{fixture}")).config
    plain = {name: value for name, value in config.items() if not isinstance(value, dict)}
    args = argparse.Namespace(**{**plain, "ckpt_format": "fsdp_dtensor", "use_megatron_fsdp": True})
    state = {
        "args": args, "checkpoint_version": 3.0, "iteration": 7,
        "model": model_state(fixture, sequential=sequential, prefix=prefix),
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 56},
        "rng_state": {"(0, 0)": [{"torch_rng_state": torch.zeros(4, dtype=torch.uint8)}]},
    }  # fmt: skip
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "iter_0000007"), no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("fixture", [DENSE, EXPERTS])
def test_it_is_the_model_that_rank_files_hold(fixture: str, sequential: bool, prefix: str, tmp_path: Path) -> None:
    root = save(tmp_path / "fsdp", fixture, sequential=sequential, prefix=prefix)
    for path in (root, root / "iter_0000007"):
        opened = registry.read(path)
        assert (opened.format, opened.config_kind, opened.training.step) == ("dcp", "megatron-args", 7)
        assert opened.format_version is not None and opened.format_version.endswith("Megatron-FSDP (fsdp_dtensor)")
        assert opened.training.has_rng and opened.training.has_scheduler
        assert opened.config["num_layers"] == registry.read(fixture_path(f"legacy/{fixture}")).config["num_layers"]
    layout = LayoutRequest(tensor_parallel=2, expert_parallel=2 if fixture == EXPERTS else None)
    convert(root, tmp_path / "ours", to="megatron-lm", layout=layout)
    convert(fixture_path(f"legacy/{fixture}"), tmp_path / "theirs", to="megatron-lm", layout=layout)
    ours, theirs = registry.read(tmp_path / "ours"), registry.read(tmp_path / "theirs")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert tensor.numpy().tobytes() == ours.tensors[name].numpy().tobytes(), name
    convert(root, tmp_path / "core", to="megatron-core")
    assert open_checkpoint(tmp_path / "core").dialect == "megatron-core"


@pytest.mark.parametrize("wrapper", ["module.module.", "module.", ""])
def test_the_optimizers_state_by_name(wrapper: str, tmp_path: Path) -> None:
    """Its names are behind the wrappers of Megatron-FSDP; halves and experts go the way of their weights."""
    model = model_state(EXPERTS, sequential=True, prefix="")
    slots = {"exp_avg": 0.5, "exp_avg_sq": 0.25, "master_param": 1.0}
    optimizer = {
        "state": {
            wrapper + name: {**{slot: value.float() * by for slot, by in slots.items()}, "step": torch.tensor(7.0)}
            for name, value in model.items()
            if not name.endswith("expert_bias")
        },
        "param_to_group_meta": {wrapper + name: {"lr": 0.1, "wd_mult": 1.0} for name in model},
    }
    config = registry.read(fixture_path(f"legacy/{EXPERTS}")).config
    args = argparse.Namespace(**{name: value for name, value in config.items() if not isinstance(value, dict)})
    state = {"args": args, "iteration": 7, "model": model, "optimizer": optimizer}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    convert(
        tmp_path / "x", tmp_path / "out", to="megatron-lm", optimizer="keep", layout=LayoutRequest(tensor_parallel=2)
    )
    opened = open_checkpoint(tmp_path / "out")
    assert opened.optimizer is not None
    found = opened.optimizer()
    assert found.step == 7
    for slot, by in {"master": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}.items():
        for name, tensor in found.slots[slot].items():
            weight = as_torch(opened.weights()[name]).float()
            assert torch.equal(as_torch(tensor), weight * by), (slot, name)
        assert found.slots[slot].keys() >= {name for name in opened.weights() if "linear" in name}


def test_a_half_alone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = model_state(DENSE, sequential=False, prefix="")
    del state["decoder.layers.2.mlp.linear_fc1.weight_v"]
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    assert run(["convert", str(tmp_path / "x"), str(tmp_path / "out"), "--to", "megatron-core"]) == 2
    error = capsys.readouterr().err
    assert "decoder.layers.2.mlp.linear_fc1.weight_w" in error and "other half" in error


def test_inspect_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = save(tmp_path / "fsdp", DENSE, sequential=True)
    assert run(["inspect", str(root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format_version"].endswith("of Megatron-FSDP (fsdp_dtensor)")
    assert facts["config"]["ckpt_format"] == "fsdp_dtensor" and facts["step"] == 7
