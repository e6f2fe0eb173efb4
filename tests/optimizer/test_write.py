"""Optimizer state in the forms that targets keep: read again it is the same, and it has the real writers' structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyckpt.checkpoint import Checkpoint, OptimizerState, ParallelLayout
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.models.dialects import spellings
from anyckpt.optimizer.read import with_optimizer
from anyckpt.optimizer.state import renamed, with_masters
from anyckpt.optimizer.write import laid_out
from anyckpt.tensor import LazyTensor, concatenate, from_array
from tests.support import fixture_path, sha256_of, write_plan

ADAMW = "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt"
NEMO_TOY = "nemo/ptl_ckpt_nemo3_0_0/toy--val_loss=1.0260-step=6-consumed_samples=12.0-last.ckpt"


def opened(path: Path | str) -> Checkpoint:
    return with_optimizer(registry.read(str(path)))


def state_of(checkpoint: Checkpoint) -> OptimizerState:
    assert checkpoint.optimizer is not None
    return checkpoint.optimizer()


def bare(checkpoint: Checkpoint, state: OptimizerState | None = None) -> Checkpoint:
    """The weights, and the state as the one thing besides: what a conversion has after renaming."""
    found = state_of(checkpoint) if state is None else state
    weights = checkpoint.weights()
    return replace(
        checkpoint, tensors=weights, model_prefix="", state_prefixes=(), objects={}, details={},
        optimizer=lambda: found,
    )  # fmt: skip


def as_kept_by(name: str, checkpoint: Checkpoint) -> Checkpoint:
    form = registry.by_name(name).optimizer
    assert form is not None
    return laid_out(checkpoint, form, name)


def written(checkpoint: Checkpoint, name: str, path: Path) -> Path:
    target = registry.by_name(name)
    assert target.plan is not None
    return write_plan(target.plan(as_kept_by(name, checkpoint), WriteOptions()), path)


def digests(slots: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, dict[str, str]]:
    return {slot: {name: sha256_of(tensor) for name, tensor in own.items()} for slot, own in slots.items()}


def numbers(*shape: int, kind: str = "float32") -> LazyTensor:
    count = int(np.prod(shape))
    return from_array(np.arange(count, dtype=np.float32).reshape(shape)).cast(kind)


# -- Megatron-Core ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt_opt_plain", "gpt_opt_fully_reshardable_dp2"])
def test_reshardable_state_has_the_structure_that_megatron_core_writes(case: str, tmp_path: Path) -> None:
    """The same model and groups, once from a plain optimizer and once from what it should become."""
    source = opened(fixture_path(f"mcore/{case}/ckpt"))
    real = opened(fixture_path("mcore/gpt_opt_fully_reshardable_dp2/ckpt"))
    again = opened(written(bare(source), "megatron-core", tmp_path / "out"))
    assert set(again.tensors) == set(real.tensors)
    for name, tensor in real.tensors.items():
        assert (again.tensors[name].shape, again.tensors[name].dtype) == (tensor.shape, tensor.dtype)
    assert again.objects["optimizer"] == real.objects["optimizer"]
    assert again.objects["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert digests(state_of(again).slots) == digests(state_of(source).slots)
    assert state_of(again).step == 10


@pytest.mark.parametrize(("experts", "chained"), [(1, False), (2, True)])
def test_experts_have_an_optimizer_of_their_own_only_in_expert_parallel_runs(
    experts: int, chained: bool, tmp_path: Path
) -> None:
    source = opened(fixture_path("mcore/gpt_moe_opt_chained_ep2/ckpt"))
    checkpoint = replace(bare(source), layout=ParallelLayout(expert_parallel=experts))
    again = opened(written(checkpoint, "megatron-core", tmp_path / "out"))
    optimizer = again.objects["optimizer"]
    if chained:
        assert optimizer == source.objects["optimizer"]
    else:
        groups = optimizer["optimizer"]["param_groups"]
        assert [(g["wd_mult"], g["is_expert_parallel"]) for g in groups] == [(1.0, False), (0.0, False)]
    assert digests(state_of(again).slots) == digests(state_of(source).slots)


def test_weights_in_fp32_are_their_own_masters(tmp_path: Path) -> None:
    source = opened(fixture_path(NEMO_TOY))
    again = opened(written(bare(source), "megatron-core", tmp_path / "out"))
    masters = {name: sha256_of(tensor) for name, tensor in state_of(again).slots["master"].items()}
    assert masters == {name: sha256_of(tensor) for name, tensor in source.weights().items()}


def test_groups_of_another_framework_come_back(tmp_path: Path) -> None:
    """Megatron-Core divides what was one group; back in Lightning it is one again, with its weight decay."""
    source = opened(fixture_path(NEMO_TOY))
    core = opened(written(bare(source), "megatron-core", tmp_path / "core"))
    groups = core.objects["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["weight_decay"], group["step"]) for group in groups] == [
        (1.0, 0.01, 6),
        (0.0, 0.01, 6),
    ]
    back = opened(written(bare(core), "lightning", tmp_path / "back.ckpt"))
    name = "optimizer_states.0.param_groups"
    assert back.objects[name] == source.objects[name]
    before, after = state_of(source), state_of(back)
    assert digests(after.slots) == digests(before.slots)
    assert (after.step, after.group_of) == (before.step, before.group_of)


def test_a_parameter_without_state_is_named() -> None:
    checkpoint = bare(opened(fixture_path(ADAMW)))
    with pytest.raises(MappingError, match=r"'frozen.weight'.*expects of every parameter.*--optimizer drop"):
        as_kept_by("megatron-core", checkpoint)


# -- Lightning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ADAMW, NEMO_TOY])
def test_numbered_state_is_the_same_again(path: str, tmp_path: Path) -> None:
    source = opened(fixture_path(path))
    again = opened(written(bare(source), "lightning", tmp_path / "out.ckpt"))
    before = {n: t for n, t in source.tensors.items() if n.startswith("optimizer_states.")}
    after = {n: t for n, t in again.tensors.items() if n.startswith("optimizer_states.")}
    assert digests({"": after}) == digests({"": before})
    name = "optimizer_states.0.param_groups"
    assert again.objects[name] == source.objects[name]


def test_masters_of_16_bit_weights_are_listed_by_group(tmp_path: Path) -> None:
    source = opened(fixture_path("mcore/gpt_opt_plain/ckpt"))
    named = replace(bare(source), dialect=None)  # as if a module had these parameters
    again = opened(written(named, "lightning", tmp_path / "out.ckpt"))
    assert "optimizer_states.0.fp32_from_fp16_params.1.0" in again.tensors
    assert digests(state_of(again).slots) == digests(
        {slot: {n: own[n] for n in again.weights()} for slot, own in state_of(source).slots.items()}
    )
    groups = again.objects["optimizer_states.0.optimizer.param_groups"]
    assert [(group["wd_mult"], group["weight_decay"]) for group in groups] == [(1.0, 0.1), (0.0, 0.0)]


def test_a_group_without_masters_keeps_its_place() -> None:
    weights: dict[str, LazyTensor] = {"a": numbers(2, 3), "b": numbers(3, kind="bfloat16")}
    slots = {slot: {"a": numbers(2, 3), "b": numbers(3)} for slot in ("exp_avg", "exp_avg_sq")}
    slots["master"] = {"b": numbers(3)}
    state = OptimizerState(slots, groups=({"lr": 1}, {"lr": 2}), group_of={"a": 0, "b": 1}, step=1)
    out = as_kept_by("lightning", Checkpoint("x", "torch", weights, optimizer=lambda: state))
    assert out.objects["optimizer_states.0.fp32_from_fp16_params.0"] == []
    assert "optimizer_states.0.fp32_from_fp16_params.1.0" in out.tensors


# -- DCP -------------------------------------------------------------------------------------------------------


def test_named_state_is_the_same_again(tmp_path: Path) -> None:
    source = opened(fixture_path("mcore/gpt_opt_plain/ckpt"))
    again = opened(written(bare(source), "dcp", tmp_path / "out"))
    before, after = state_of(source), state_of(again)
    assert digests(after.slots) == digests(before.slots)
    assert (after.step, after.group_of) == (before.step, before.group_of)
    assert [group["weight_decay"] for group in after.groups] == [0.1, 0.0]
    path = again.key_paths["optim.state.output_layer.weight.exp_avg"]
    assert path == ("optim", "state", "output_layer.weight", "exp_avg")


# -- what is refused -------------------------------------------------------------------------------------------


def state(**slots: dict[str, LazyTensor]) -> OptimizerState:
    return OptimizerState({slot: dict(own) for slot, own in slots.items()})


def test_what_cannot_be_written() -> None:
    weights: dict[str, LazyTensor] = {"a.weight": numbers(2, 3), "a.running_mean": numbers(2)}
    momentum = state(momentum_buffer={"a.weight": numbers(2, 3)})
    buffer = state(**{slot: {"a.running_mean": numbers(2)} for slot in ("exp_avg", "exp_avg_sq")})
    for odd, target, words in (
        (momentum, "megatron-core", "is not Adam, and megatron-core has a place for Adam's state only"),
        (momentum, "megatron-lm", "is not Adam.*found momentum_buffer"),
        (buffer, "dcp", "is no parameter"),
    ):
        with pytest.raises(MappingError, match=words):
            as_kept_by(target, Checkpoint("x", "torch", weights, optimizer=lambda odd=odd: odd))


def test_a_rank_format_lays_state_out_itself() -> None:
    checkpoint = opened(fixture_path("mcore/gpt_opt_plain/ckpt"))
    found = as_kept_by("megatron-lm", bare(checkpoint))
    assert digests(state_of(found).slots) == digests(state_of(checkpoint).slots)


def test_groups_that_nothing_tells_are_refused_when_they_are_needed() -> None:
    weights: dict[str, LazyTensor] = {"a.weight": numbers(2, 3)}
    slots = {slot: {"a.weight": numbers(2, 3)} for slot in ("exp_avg", "exp_avg_sq")}
    twins = ({"wd_mult": 1.0, "lr_mult": 1.0}, {"wd_mult": 1.0, "lr_mult": 0.1})
    checkpoint = Checkpoint("x", "torch", weights, optimizer=lambda: OptimizerState(slots, groups=twins))
    for form in ("dcp", "lightning"):
        with pytest.raises(MappingError, match="nothing tells which of the optimizer's parameter groups.*2 of 2"):
            as_kept_by(form, checkpoint)


# -- renaming --------------------------------------------------------------------------------------------------


def test_slots_and_groups_follow_the_weights() -> None:
    source = opened(fixture_path("mcore/gpt_moe_opt_chained_ep2/ckpt"))

    def to_hub(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        return spellings.to_hub_names(tensors)[0]

    state = renamed(state_of(source), to_hub)
    hub = to_hub(source.weights())
    trained = {name for name in hub if not name.endswith("expert_bias")}
    assert all(set(own) == trained for own in state.slots.values())
    assert all(own[name].shape == hub[name].shape for own in state.slots.values() for name in own)
    assert state.group_of["decoder.layers.0.mlp.experts.linear_fc1.weight1"] == 2
    assert state.group_of["decoder.final_layernorm.weight"] == 1
    assert state.step == 10


def test_renamed_there_and_back_it_is_the_same() -> None:
    before = state_of(opened(fixture_path("mcore/gpt_opt_plain/ckpt")))
    hub = renamed(before, lambda tensors: spellings.to_hub_names(tensors)[0])
    after = renamed(hub, lambda tensors: spellings.from_hub_names(tensors, "megatron-core"))
    assert digests(after.slots) == digests(before.slots)
    assert after.group_of == before.group_of


def test_masters_may_be_mapped_otherwise() -> None:
    slots: dict[str, dict[str, LazyTensor]] = {"master": {"a": numbers(2)}, "exp_avg": {"a": numbers(2)}}
    state = renamed(
        OptimizerState(slots),
        lambda tensors: {"b": tensors["a"]},
        master=lambda tensors: {"b": concatenate([tensors["a"], tensors["a"]], 0)},
    )
    assert (state.slots["master"]["b"].shape, state.slots["exp_avg"]["b"].shape) == ((4,), (2,))


def test_a_rule_that_does_not_fit_names_the_slot() -> None:
    def refuse(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        raise MappingError("1 tensors of the model are missing", tensor="a", remedy="copy the missing files")

    with pytest.raises(MappingError, match="exp_avg does not fit the model: 1 tensors.*--optimizer drop"):
        renamed(OptimizerState({"exp_avg": {"b": numbers(2)}}), refuse)


def test_masters_are_completed_from_weights() -> None:
    weights: dict[str, LazyTensor] = {"a": numbers(2, kind="bfloat16"), "b": numbers(2)}
    full = with_masters(OptimizerState({"exp_avg": {"a": numbers(2), "b": numbers(2)}}), weights)
    assert list(full.slots) == ["master", "exp_avg"]
    assert all(tensor.dtype == dtype("float32") for tensor in full.slots["master"].values())
    with pytest.raises(MappingError, match="has optimizer state but no weight"):
        with_masters(OptimizerState({"exp_avg": {"c": numbers(2)}}), weights)
