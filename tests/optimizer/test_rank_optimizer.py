"""Optimizer state in NeMo 1's files of one rank each, joined and taken to other formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.containers.torch_file import read_torch
from anyckpt.errors import AnyckptError
from anyckpt.formats import registry
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.optimizer.read import with_optimizer
from anyckpt.storage.source import MemorySource
from tests.formats.test_nemo_ranks import old_model
from tests.optimizer.rank_files import (
    SLOTS,
    apex_whole,
    bare,
    biases,
    config_of,
    matrices,
    of_slot,
    ranks_of,
    wrapped,
    written,
)
from tests.support import fixture_path, sha256_of

CASES = ("nemo/nemo1_mp_tp2", "nemo/nemo1_mp_tp2_pp2")
CASE = CASES[1]


def state_of(checkpoint: Checkpoint) -> OptimizerState:
    found = with_optimizer(checkpoint)
    assert found.optimizer is not None
    return found.optimizer()


def check(checkpoint: Checkpoint, *, master: bool = True) -> OptimizerState:
    """Each slot is the function of the joined weights that the ranks' were of theirs."""
    state = state_of(checkpoint)
    assert set(state.slots) == set(SLOTS)
    for slot, tensors in state.slots.items():
        assert tensors.keys() == checkpoint.tensors.keys()
        for name, tensor in tensors.items():
            weight = checkpoint.tensors[name]
            expected = of_slot(slot, weight).numpy() if master or slot != "master" else weight.numpy()
            np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=f"{slot} of {name}")
    assert state.step == 6
    return state


def saved(tmp_path: Path, case: str = CASE, form: Any = wrapped, rule: Any = matrices) -> Path:
    return written(tmp_path / "checkpoints", ranks_of(case), config_of(case), lambda _, state: [form([state], rule)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [wrapped, apex_whole])
@pytest.mark.parametrize("rule", [matrices, biases, lambda name, weight: int("norm" in name)])
def test_state_of_ranks_is_joined_as_the_weights_are(case: str, form: Any, rule: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, case, form, rule))
    assert checkpoint.training.has_optimizer
    state = check(checkpoint)
    undecayed = {name for name, number in state.group_of.items() if number == 1}
    assert undecayed == ({n for n, t in checkpoint.tensors.items() if t.ndim == 1} if rule is not biases else set())
    assert [group["weight_decay"] for group in state.groups] == [0.1, 0.0][: len(state.groups)]


def test_nemos_own_modules_with_halves_apart(tmp_path: Path) -> None:
    """Gate and up projection are two parameters there; ours is one."""
    members, whole = old_model(2, gated=True, legacy=True, wrapper="model.module.")
    ranks = {
        name.partition("/")[0]: dict(read_torch(MemorySource(data)).root)
        for name, data in members.items()
        if name.endswith(".ckpt")
    }
    config = {
        "num_layers": 1, "hidden_size": next(iter(whole.values())).shape[1], "num_attention_heads": 4,
        "megatron_legacy": True, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
        "activation": "swiglu",
    }  # fmt: skip
    root = written(tmp_path / "c", ranks, config, lambda _, state: [bare([state], matrices)])
    checkpoint = open_checkpoint(root)
    assert checkpoint.tensors.keys() == whole.keys()
    check(checkpoint, master=False)


def test_virtual_pipeline(tmp_path: Path) -> None:
    """One optimizer for a rank's chunks; its parameters count through all of them."""
    source = registry.read(str(fixture_path("legacy/megatron_gpt_tp2_pp2_vpp2")))
    ranks: dict[str, dict[str, Any]] = {}
    for shard in source.ranks:
        folder = f"tp_rank_{shard.tensor_rank:02d}_pp_rank_{shard.pipeline_rank:03d}"
        own = {f"model.{name}": tensor for name, tensor in part_norms(shard.tensors).items()}
        ranks.setdefault(folder, {})[f"model{shard.virtual_rank}"] = own
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "padded_vocab_size")
    config = {
        **{key: source.config[key] for key in keys}, "share_embeddings_and_output_weights": False,
        "activation": "swiglu" if source.config.get("swiglu") else "gelu", "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
    }  # fmt: skip
    root = written(tmp_path / "c", ranks, config, lambda _, state: [bare(list(state.values()), matrices)])
    check(open_checkpoint(root), master=False)


@pytest.mark.parametrize("to", ["megatron-core", "megatron-lm", "lightning", "dcp"])
def test_into_every_target_that_keeps_state(to: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    path = tmp_path / ("out.ckpt" if to == "lightning" else "out")
    convert(source, path, to=to, optimizer="keep", layout=LayoutRequest(tensor_parallel=1, pipeline_parallel=1))
    whole, again = state_of(open_checkpoint(source)), open_checkpoint(path)
    found = state_of(again)
    assert found.step == 6 and again.training.step == 6
    for slot, tensors in whole.slots.items():
        theirs = spellings.to_hub_names(found.slots[slot])[0]
        assert {n: sha256_of(t) for n, t in theirs.items()} == {n: sha256_of(t) for n, t in tensors.items()}


def test_groups_stay_what_they_were(tmp_path: Path) -> None:
    """Norms that NeMo lets decay still do, though Megatron would not."""
    source = saved(tmp_path, rule=lambda name, weight: int("final" in name or "fc2" in name))
    with pytest.raises(AnyckptError, match="do not fit the rank's parameters.*entries in 2 groups.*--optimizer drop"):
        convert(source, tmp_path / "out.ckpt", to="lightning", optimizer="keep")
    source = saved(tmp_path / "b", rule=biases)
    convert(source, tmp_path / "core", to="megatron-core", optimizer="keep")
    state = state_of(open_checkpoint(tmp_path / "core"))
    assert len(state.groups) == 1 and set(state.group_of.values()) == {0}
    assert [group["weight_decay"] for group in state.groups] == [0.1]


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "two optimizers": (lambda own: [own, own], "has not one optimizer.*found 2 optimizers"),
    "another layout": (
        lambda own: [{"param_state": {}, "optimizer": {"param_groups": []}}],
        "of a layout that is not understood.*found param_groups",
    ),
    "a group too few": (
        lambda own: own["optimizer"]["param_groups"].pop(),
        "do not fit the rank's parameters.*expected state of 7 parameters.*found 5 entries in 1 groups",
    ),
    "a parameter too few": (
        lambda own: own["optimizer"]["param_groups"][0]["params"].pop() and None,
        "do not fit the rank's parameters.*4 \\+ 2 entries",
    ),
    "no state": (lambda own: own["optimizer"]["state"].pop(1), "has no state for a parameter.*number 1"),
    "a master too few": (
        lambda own: own["fp32_from_fp16_params"][1].pop() and None,
        "float32 weights of parameter group 1 do not fit.*expected 2.*found 1",
    ),
    "numbers that are none": (
        lambda own: own["optimizer"]["param_groups"][0].update(params=[[1], {}, None, 1.5, "x"]),
        "has no state for a parameter|do not fit the rank's parameters",
    ),
    "groups that are none": (lambda own: own["optimizer"].update(param_groups=[3]), "layout that is not understood"),
    "no moment": (lambda own: own["optimizer"]["state"][0].pop("exp_avg_sq"), "exp_avg_sq does not fit"),
    "another step": (
        lambda own: own["optimizer"]["param_groups"][1].update(step=7),
        "different numbers of optimizer steps.*found 6, 7",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_add_up_is_refused(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]

    def optimizer(folder: str, state: Any) -> Any:
        own = wrapped([state], matrices)
        changed = change(own)
        return changed if isinstance(changed, list) else [own]

    root = written(tmp_path / "c", ranks_of(CASE), config_of(CASE), optimizer)
    checkpoint = open_checkpoint(root)  # the weights are sound
    with pytest.raises(AnyckptError, match=words) as error:
        state_of(checkpoint)
    assert "--optimizer drop" in str(error.value)


def test_shapes_that_differ_are_refused(tmp_path: Path) -> None:
    def optimizer(folder: str, state: Any) -> Any:
        own = wrapped([state], matrices)
        states = own["optimizer"]["state"]
        states[0], states[1] = states[1], states[0]
        return [own]

    root = written(tmp_path / "c", ranks_of(CASE), config_of(CASE), optimizer)
    with pytest.raises(AnyckptError, match="do not fit the rank's parameters.*or of other shapes.*--optimizer drop"):
        state_of(open_checkpoint(root))
