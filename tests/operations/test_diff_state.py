"""Training state in ``diff``: of every format, by what it means, and whatever only one side has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import MappingError
from anyckpt.operations.difference import Difference
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import LazyTensor, from_array

BY_PARAMETER = [
    "deepspeed/zero1",
    "deepspeed/zero2",
    "deepspeed/zero3",
    "legacy/megatron_distopt_tp2_dp2",
    "legacy/megatron_gpt_fp32_optim_tp2",
    "legacy/megatron_gpt_tp2_pp2",
    "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt",
    "mcore/dcp_fsdp_w2/ckpt",
    "mcore/dcp_hsdp_tp_w4/ckpt",
    "mcore/gpt_moe_opt_chained_ep2/ckpt",
    "mcore/gpt_moe_opt_chained_ep2_dp_reshardable/ckpt",
    "mcore/gpt_opt_dp_reshardable_dp2/ckpt",
    "mcore/gpt_opt_fully_reshardable_dp2/ckpt",
    "mcore/gpt_opt_plain/ckpt",
    "nemo/lightning_fsdp2/m-step=2.ckpt",
    "nemo/lightning_fsdp2_full/m-step=2.ckpt",
    "nemo/lightning_tp/m-step=2.ckpt",
    "nemo/ptl_ckpt_nemo2_5_3/toy--val_loss=1.0260-step=6-consumed_samples=12.0-last.ckpt",
]
AS_STORED = [
    "mcore/torchdist_v012_w4_flat/ckpt",
    "mcore/torchdist_v015_w2_flat/ckpt",
    "mcore/zarr_v012_w2_flat/ckpt",
    "nemo/ptl_ckpt_ema_nemo3_0_0/toy--val_loss=1.0282-step=6-consumed_samples=12.0-last-EMA.ckpt",
    "legacy/layouts/nanogpt.pt",
]
MEGATRON = "legacy/megatron_gpt_fp32_optim_tp2"


def state_of(checkpoint: Checkpoint) -> OptimizerState:
    find = with_optimizer(checkpoint).optimizer
    assert find is not None
    return find()


def altered(source: Path, tensor: LazyTensor, folder: Path) -> Path:
    """A copy of a checkpoint in which a byte of a tensor's last element is another one, in its file."""
    copy = folder / source.name
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy)
    piece = list(tensor.pieces())[-1]
    where, offset = piece.source.locate()
    assert where is not None
    file = copy / Path(where).relative_to(source) if source.is_dir() else copy
    data = bytearray(file.read_bytes())
    data[offset + piece.offset] ^= 0x41
    file.write_bytes(data)
    return copy


def names_of(found: Difference) -> set[str]:
    return {tensor.name for tensor in found.different} | {setting.name for setting in found.state}


@pytest.mark.parametrize("name", BY_PARAMETER)
def test_another_moment_in_the_file_is_a_difference(name: str, tmp_path: Path) -> None:
    source = fixture_path(name)
    slots = state_of(open_checkpoint(source)).slots
    assert slots
    slot, own = next((slot, own) for slot, own in slots.items() if slot != "master")
    parameter = next(key for key in own if own[key].size > 8 and "embedding" not in key)
    copy = altered(source, own[parameter], tmp_path)
    found = anyckpt.diff(source, copy)
    assert not found.equal
    assert next(tensor.name for tensor in found.different).startswith(f"optimizer.{slot}.")
    assert not found.configuration
    assert not anyckpt.diff(source, copy, raw=True).equal
    assert anyckpt.diff(source, copy, weights_only=True).equal
    assert anyckpt.diff(source, source).equal


@pytest.mark.parametrize("name", AS_STORED)
def test_state_of_unknown_parameters_is_compared_as_it_is_stored(name: str, tmp_path: Path) -> None:
    source = fixture_path(name)
    checkpoint = open_checkpoint(source)
    weights = {checkpoint.model_prefix + weight for weight in checkpoint.weights()}
    besides = {key: t for key, t in checkpoint.tensors.items() if key not in weights and t.size > 4}
    chosen = next((key for key in besides if "ema" in key), next(iter(besides)))
    copy = altered(source, besides[chosen], tmp_path)
    assert chosen in names_of(anyckpt.diff(source, copy))
    same = anyckpt.diff(source, source)
    assert same.equal
    assert same.complete


def test_state_in_objects_whose_order_nothing_tells_is_compared_as_it_is_stored() -> None:
    source = fixture_path("mcore/gpt_opt_dp_zero_dp2/ckpt")
    same = anyckpt.diff(source, source)
    assert same.equal
    assert any("compared as it is stored" in text for text in same.not_compared)
    checkpoint = open_checkpoint(source)
    name = next(name for name in checkpoint.objects if name.startswith("optimizer."))
    other = replace(checkpoint, objects={**dict(checkpoint.objects), name: 3})
    assert [setting.name.split(".")[0] for setting in anyckpt.diff(source, other).state] == ["optimizer"]


@pytest.mark.parametrize("name", [*BY_PARAMETER, *AS_STORED])
@pytest.mark.parametrize("raw", [False, True])
def test_where_training_stood(name: str, raw: bool) -> None:
    checkpoint = open_checkpoint(fixture_path(name))
    for field in ("step", "epoch", "consumed_samples"):
        later = replace(checkpoint, training=replace(checkpoint.training, **{field: 12345}))
        found = anyckpt.diff(checkpoint, later, raw=raw)
        before = getattr(checkpoint.training, field)
        assert [(s.name, s.a, s.b) for s in found.state] == [(field, None if before is None else str(before), "12345")]
        assert not found.equal
        assert anyckpt.diff(checkpoint, later, weights_only=True).equal


def test_the_iteration_in_the_files_of_ranks(tmp_path: Path) -> None:
    source = fixture_path(MEGATRON)
    copy = tmp_path / "run"
    shutil.copytree(source, copy)
    for file in copy.rglob("*.pt"):
        data = file.read_bytes()
        assert data.count(b"iterationqAK\x07") == data.count(b"hAK\x07") == 1  # of the arguments, and of the state
        file.write_bytes(data.replace(b"hAK\x07", b"hAK\x09"))
    for folder in copy.glob("iter_*"):
        folder.rename(copy / "iter_0000009")
    (copy / "latest_checkpointed_iteration.txt").write_text("9")
    found = anyckpt.diff(source, copy)
    assert ("step", "7", "9") in [(setting.name, setting.a, setting.b) for setting in found.state]


def with_objects(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects}
    change(objects)
    return replace(checkpoint, objects=objects)


def test_schedulers_and_random_states() -> None:
    source = open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    scheduler = source.objects["opt_param_scheduler"]
    other = with_objects(source, lambda held: held.update(opt_param_scheduler={**scheduler, "max_lr": 3.0}))
    assert [setting.name for setting in anyckpt.diff(source, other).state] == ["opt_param_scheduler.max_lr"]
    ranks = [name for name in source.objects if name.endswith("rng_state")]
    other = with_objects(source, lambda held: held.update({ranks[0]: [{"random_rng_state": 3}]}))
    assert all(s.name.startswith("rng_state/shard_0.0_2.2") for s in anyckpt.diff(source, other).state)
    assert not anyckpt.diff(source, other).equal
    without = with_objects(source, lambda held: [held.pop(name) for name in ranks] and None)
    assert [(s.name, s.a, s.b) for s in anyckpt.diff(source, without).state] == [("random states", "of 4 ranks", None)]


@pytest.mark.parametrize("target", ["megatron-core", "megatron-lm", "megatron-core-zarr"])
@pytest.mark.parametrize("name", [MEGATRON, "legacy/megatron_distopt_tp2_dp2"])
def test_state_meets_across_formats_by_parameter(name: str, target: str, tmp_path: Path) -> None:
    source = fixture_path(name)
    anyckpt.convert(source, tmp_path / "out", to=target, optimizer="keep")
    found = anyckpt.diff(source, tmp_path / "out")
    assert found.equal
    assert found.complete
    assert found.compared == 4 * anyckpt.diff(source, tmp_path / "out", weights_only=True).compared
    copy = altered(source, list(state_of(open_checkpoint(source)).slots["exp_avg_sq"].values())[3], tmp_path)
    other = anyckpt.diff(tmp_path / "out", copy, statistics=True)
    assert [tensor.name.split(".")[:2] for tensor in other.different] == [["optimizer", "exp_avg_sq"]]
    assert [movement.name for movement in other.most_moved()] == [other.different[0].name]


def test_ranks_of_another_layout_meet(tmp_path: Path) -> None:
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    anyckpt.reshard(source, tmp_path / "one", layout=LayoutRequest(tensor_parallel=1, pipeline_parallel=1))
    found = anyckpt.diff(source, tmp_path / "one")
    assert not found.different + found.only_in_a + found.only_in_b
    assert [(s.name, s.a, s.b) for s in found.state] == [("random states", "of 4 ranks", None)]


def test_what_only_one_has_is_a_difference(tmp_path: Path) -> None:
    source = fixture_path(MEGATRON)
    anyckpt.convert(source, tmp_path / "bare", to="megatron-lm")
    found = anyckpt.diff(source, tmp_path / "bare")
    said = {setting.name: (setting.a, setting.b) for setting in found.state}
    assert said["optimizer"] == ("master, exp_avg, exp_avg_sq of 16 parameters", None)
    assert not found.different + found.only_in_a + found.only_in_b
    assert {setting.name: setting.b for setting in anyckpt.diff(tmp_path / "bare", source).state}["optimizer"]
    anyckpt.convert(source, tmp_path / "hf", to="hf")
    across = anyckpt.diff(source, tmp_path / "hf")
    assert {"optimizer", "step", "consumed_samples", "scheduler"} == {setting.name for setting in across.state}
    assert anyckpt.diff(source, tmp_path / "hf", weights_only=True).equal


def test_masters_are_compared_with_weights_where_one_has_none() -> None:
    checkpoint = open_checkpoint(fixture_path(MEGATRON))
    state = state_of(checkpoint)
    bare = replace(state, slots={slot: own for slot, own in state.slots.items() if slot != "master"})
    without = replace(checkpoint, optimizer=lambda: bare)
    found = anyckpt.diff(checkpoint, without)
    assert found.compared == anyckpt.diff(checkpoint, checkpoint).compared
    assert all(tensor.name.startswith("optimizer.master.") for tensor in found.different)


def test_hyperparameters_of_groups_and_the_loss_scale() -> None:
    checkpoint = open_checkpoint(fixture_path(MEGATRON))
    state = state_of(checkpoint)

    def changed(**changes: Any) -> list[tuple[str, str | None, str | None]]:
        other = replace(checkpoint, optimizer=lambda: replace(state, **changes))
        return [(s.name, s.a, s.b) for s in anyckpt.diff(checkpoint, other).state]

    groups = [dict(group) for group in state.groups]
    lr = groups[1]["lr"]
    groups[1]["lr"] = 0.5
    assert changed(groups=tuple(groups)) == [("optimizer.groups.1.lr", str(lr), "0.5")]
    assert changed(grad_scaler={"scale": 2.0}) == [("optimizer.grad_scaler", None, "{'scale': 2.0}")]
    assert changed(step=99) == [("optimizer.step", "7", "99")]
    one = tuple({**group, "lr": 0.5} for group in state.groups[:1])
    assert ("optimizer.groups.0.lr", str(lr), "0.5") in changed(groups=one)


@pytest.mark.parametrize("name", [MEGATRON, "legacy/megatron_distopt_tp2_dp2"])
def test_hyperparameters_that_one_rank_alone_has_otherwise(name: str) -> None:
    """The state by parameter has the first rank's; a framework loads each rank's own."""
    one, other = (open_checkpoint(fixture_path(name)) for _ in range(2))
    assert anyckpt.diff(one, other).equal
    held = other.objects["mp_rank_01/optimizer"]
    groups = held.get("optimizer", held)["param_groups"]
    groups[0]["lr"] = 0.5
    [found] = anyckpt.diff(one, other).state
    assert found.name.startswith("mp_rank_01/optimizer.")
    assert (found.name.endswith("param_groups.0.lr"), found.b) == (True, "0.5")


def test_slots_that_only_one_has() -> None:
    checkpoint = open_checkpoint(fixture_path(MEGATRON))
    state = state_of(checkpoint)
    slots = {("momentum" if slot == "exp_avg" else slot): own for slot, own in state.slots.items()}
    found = anyckpt.diff(checkpoint, replace(checkpoint, optimizer=lambda: replace(state, slots=slots)))
    assert [(s.name, s.a, s.b) for s in found.state] == [
        ("optimizer.exp_avg", "of 16 parameters", None),
        ("optimizer.momentum", None, "of 16 parameters"),
    ]


def test_state_of_other_shapes_than_the_weights() -> None:
    tensors = {"w": from_array(np.ones((2, 3), "<f4"))}
    rows = [OptimizerState(others={"row": {"w": from_array(np.full(2, value, "<f4"))}}) for value in (1, 1, 2)]
    made = [Checkpoint("made", "torch", tensors, optimizer=lambda own=own: own) for own in rows]  # type: ignore[misc]
    assert anyckpt.diff(made[0], made[1]).equal
    assert [setting.name for setting in anyckpt.diff(made[0], made[2]).state] == ["optimizer.row.w"]


def test_an_optimizer_that_only_one_side_tells_of_its_parameters() -> None:
    """It is compared as it is stored in files of one layout, and told where it cannot be."""

    def fail() -> OptimizerState:
        raise MappingError("counts do not fit", path="x", remedy="leave it out")

    checkpoint = open_checkpoint(fixture_path(MEGATRON))
    unclear = replace(checkpoint, optimizer=fail)
    found = anyckpt.diff(checkpoint, unclear)
    assert found.equal
    assert found.complete
    assert any("counts do not fit; it is compared as it is stored" in text for text in found.not_compared)
    elsewhere = replace(unclear, layout=replace(unclear.layout, tensor_parallel=4))
    across = anyckpt.diff(checkpoint, elsewhere)
    assert not across.complete
    assert any("counts do not fit; it is not compared" in text for text in across.not_compared)
    assert not anyckpt.diff(checkpoint, unclear, raw=True).only_in_a


def saved(path: Path, **root: Any) -> Path:
    return write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), path)


def test_globs_reach_moments(tmp_path: Path) -> None:
    source = fixture_path(MEGATRON)
    own = state_of(open_checkpoint(source)).slots["exp_avg"]
    copy = altered(source, own["decoder.layers.0.mlp.linear_fc1.weight"], tmp_path)
    found = anyckpt.diff(source, copy, tensors="optimizer.exp_avg.*")
    assert found.compared == len(own)
    assert len(found.different) == 1
    assert not found.complete
    assert anyckpt.diff(source, copy, tensors="optimizer.exp_avg_sq.*").equal


def test_what_the_configuration_does_not_say_is_told_or_compared(tmp_path: Path) -> None:
    """Where no configuration is understood, hyper-parameters are objects like others."""
    weight = from_array(np.ones(2, "<f4"))
    first, second = (saved(tmp_path / f"{n}.pt", w=weight, hyper_parameters={"lr": n}) for n in (1, 2))
    assert [setting.name for setting in anyckpt.diff(first, second).state] == ["hyper_parameters.lr"]
    checkpoint = open_checkpoint(fixture_path(MEGATRON))
    assert any("args" in text and "--raw" in text for text in anyckpt.diff(checkpoint, checkpoint).not_compared)


@pytest.mark.parametrize("name", [MEGATRON, "legacy/megatron_gpt_tp2_pp2", "legacy/megatron_moe_tp2_ep2"])
def test_another_rotary_base_in_the_files_of_ranks(name: str, tmp_path: Path) -> None:
    source = fixture_path(name)
    copy = tmp_path / "run"
    shutil.copytree(source, copy)
    for file in copy.rglob("*.pt"):
        data = file.read_bytes()
        at = data.index(b"M\x10\x27", data.index(b"rotary_base"))
        file.write_bytes(data[:at] + b"M\x20\x4e" + data[at + 3 :])
    found = anyckpt.diff(source, copy)
    assert [(s.name, float(s.a or 0), float(s.b or 0)) for s in found.configuration] == [("rotary_base", 10000, 20000)]
    assert not found.equal
    assert not anyckpt.diff(source, copy, raw=True).equal
    assert anyckpt.diff(source, copy, weights_only=True).equal
