"""Optimizer state that real frameworks wrote, by parameter: digests are those of the fixtures' own descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import LazyTensor, from_array
from tests.support import expected_of, fixture_path, sha256_of

ADAMW = "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt"
NEMO_TOY = "nemo/ptl_ckpt_nemo3_0_0/toy--val_loss=1.0260-step=6-consumed_samples=12.0-last.ckpt"
MODEL_SPACE = {
    "gpt_opt_plain": "fp32_param",
    "gpt_opt_fully_reshardable_dp2": "param",
    "gpt_moe_opt_chained_ep2": "param",
}


def opened(path: str) -> Checkpoint:
    return with_optimizer(registry.read(str(fixture_path(path))))


def state_of(checkpoint: Checkpoint) -> OptimizerState:
    assert checkpoint.optimizer is not None
    return checkpoint.optimizer()


def changed(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor | None], objects: Mapping[str, Any] | None = None
) -> OptimizerState:
    """The state of a checkpoint some of whose tensors (None: left out) and objects are others."""
    merged = {**checkpoint.tensors, **tensors}
    kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
    everything = {**{name: checkpoint.objects[name] for name in checkpoint.objects}, **(objects or {})}
    return state_of(with_optimizer(replace(checkpoint, tensors=kept, objects=everything, optimizer=None)))


def numbers(*shape: int) -> LazyTensor:
    return from_array(np.zeros(shape, np.float32))


# -- Megatron-Core, tensors of the weights' shapes -------------------------------------------------------------


@pytest.mark.parametrize("case", MODEL_SPACE)
def test_megatron_core_state_is_what_was_written(case: str) -> None:
    checkpoint = opened(f"mcore/{case}/ckpt")
    state = state_of(checkpoint)
    expected = expected_of(f"mcore/{case}")["tensors"]
    names = {"master": MODEL_SPACE[case], "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    assert sorted(state.slots) == sorted(names)
    seen = set()
    for slot, tensors in state.slots.items():
        assert set(tensors) == {name for name in checkpoint.weights() if not name.endswith("expert_bias")}
        for name, tensor in tensors.items():
            key = f"optimizer.state.{names[slot]}.{name}"
            assert sha256_of(tensor) == expected[key]["sha256"], key
            seen.add(key)
    assert seen == {name for name in expected if name.startswith("optimizer.")}
    assert state.step == 10


def test_megatron_core_groups_are_told_by_what_they_say() -> None:
    state = state_of(opened("mcore/gpt_moe_opt_chained_ep2/ckpt"))
    assert [(group["wd_mult"], group["is_expert_parallel"]) for group in state.groups] == [
        (1.0, False),
        (0.0, False),
        (1.0, True),
    ]
    assert not any("step" in group or "params" in group for group in state.groups)
    assert state.group_of["decoder.layers.self_attention.linear_qkv.weight"] == 0
    assert state.group_of["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] == 1  # stacked: two axes
    assert state.group_of["decoder.layers.mlp.router.weight"] == 0
    assert state.group_of["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == 2


def test_a_chain_may_have_prefixes() -> None:
    """Runs without ``chained_optim_avoid_prefix`` name the optimizer of each tensor."""
    checkpoint = registry.read(str(fixture_path("mcore/gpt_moe_opt_chained_ep2/ckpt")))
    plain = state_of(with_optimizer(checkpoint))
    tensors = {
        f"chained_{int('.experts.' in name)}.{name}" if name.startswith("optimizer.") else name: tensor
        for name, tensor in checkpoint.tensors.items()
    }
    prefixes = ("chained_0.optimizer.", "chained_1.optimizer.")
    state = state_of(with_optimizer(replace(checkpoint, tensors=tensors, state_prefixes=prefixes)))
    assert state.slots == plain.slots
    assert state.group_of == plain.group_of


def test_nemo_1_keeps_the_common_part_under_lightnings_name() -> None:
    """And steps beside the sharded state, where Apex's optimizer had them."""
    checkpoint = registry.read(str(fixture_path("mcore/gpt_opt_plain/ckpt")))
    plain = state_of(with_optimizer(checkpoint))
    objects = {name: checkpoint.objects[name] for name in checkpoint.objects if name != "optimizer"}
    inner = checkpoint.objects["optimizer"]["optimizer"]
    groups = [{key: value for key, value in group.items() if key != "step"} for group in inner["param_groups"]]
    states = [{"optimizer": {"state": {"step": 10}, "param_groups": groups}}]
    state = state_of(with_optimizer(replace(checkpoint, objects={**objects, "optimizer_states": states})))
    assert state.slots == plain.slots and state.step == plain.step == 10
    assert state.group_of == plain.group_of and len(state.groups) == 2


def test_megatron_core_state_of_another_model() -> None:
    checkpoint = opened("mcore/gpt_opt_plain/ckpt")
    name = "optimizer.state.exp_avg.output_layer.weight"
    with pytest.raises(MappingError, match=r"expected \(16, 8\), found \(16, 9\).*--optimizer drop"):
        changed(checkpoint, {name: numbers(16, 9)})
    with pytest.raises(MappingError, match="is no weight of the model"):
        changed(checkpoint, {"optimizer.state.exp_avg.nowhere": numbers(16, 8)})
    with pytest.raises(MappingError, match=r"exp_avg is missing for some.*expected 9 tensors, found 8 of exp_avg, 9"):
        changed(checkpoint, {name: None})
    with pytest.raises(MappingError, match="there are two tensors"):
        changed(checkpoint, {"chained_0." + name: numbers(16, 8)})


def test_megatron_core_groups_that_are_not_groups() -> None:
    checkpoint = opened("mcore/gpt_opt_plain/ckpt")
    with pytest.raises(Exception, match="param_groups are not a list of groups"):
        changed(checkpoint, {}, {"optimizer": {"optimizer": {"param_groups": {"lr": 1}}}})
    with pytest.raises(Exception, match="is not a dictionary"):
        changed(checkpoint, {}, {"optimizer": ["x"]})


def test_steps_that_differ_are_refused() -> None:
    checkpoint = opened("mcore/gpt_opt_fully_reshardable_dp2/ckpt")
    groups = [{"wd_mult": 1.0, "step": 10}, {"wd_mult": 0.0, "step": 11}]
    with pytest.raises(MappingError, match="different numbers of optimizer steps.*found 10, 11"):
        changed(checkpoint, {}, {"optimizer": {"optimizer": {"param_groups": groups}}})


# -- by number -------------------------------------------------------------------------------------------------


def test_numbered_state_is_what_was_written() -> None:
    state = state_of(opened(ADAMW))
    expected = expected_of("legacy/ptl_adamw")
    for slot in ("exp_avg", "exp_avg_sq"):
        assert set(state.slots[slot]) == set(expected["optimizer"])
        for name, tensor in state.slots[slot].items():
            assert sha256_of(tensor) == expected["optimizer"][name][slot]["sha256"]
    assert set(state.slots) == {"exp_avg", "exp_avg_sq"}  # in fp32 the weights are their own masters
    assert state.step == 5
    by_group = sorted(state.group_of, key=lambda name: state.group_of[name])
    assert by_group == ["emb.weight", "lin.weight", "ln.weight", "ln.bias", "lin.bias", "bn.weight", "bn.bias"]
    assert [group["name"] for group in state.groups] == ["decay", "nodecay"]


def test_one_group_has_the_parameters_in_order() -> None:
    state = state_of(opened(NEMO_TOY))
    assert list(state.slots["exp_avg"]) == ["l1.weight", "l1.bias", "l2.weight", "l2.bias"]
    assert state.step == 6


def test_shapes_that_do_not_fit_the_parameters() -> None:
    checkpoint = opened(ADAMW)
    with pytest.raises(MappingError, match=r"does not fit.*expected \(7, 4\), found \(9, 4\) in entry 0.*drop"):
        changed(checkpoint, {f"optimizer_states.0.state.0.{s}": numbers(9, 4) for s in ("exp_avg", "exp_avg_sq")})
    with pytest.raises(MappingError, match="expected at most 3, found 4"):
        everything = checkpoint.objects["optimizer_states.0.param_groups"]
        extra = {f"optimizer_states.0.state.{i}.exp_avg": numbers(7, 4) for i in (7, 8)}
        changed(checkpoint, extra, {"optimizer_states.0.param_groups": with_indices(everything, [0, 1, 7, 8])})


def with_indices(groups: list[dict[str, Any]], indices: list[int]) -> list[dict[str, Any]]:
    """Groups, the first of which has other parameters."""
    return [{**groups[0], "params": indices}, *groups[1:]]


def test_fewer_states_than_parameters_need_shapes_that_tell() -> None:
    """Two equal layers of which one is frozen: nothing tells which."""
    checkpoint = opened(NEMO_TOY)
    dropped: dict[str, LazyTensor | None] = {
        f"optimizer_states.0.state.{i}.{s}": None for i in (2, 3) for s in ("exp_avg", "exp_avg_sq", "step")
    }
    groups = with_indices(checkpoint.objects["optimizer_states.0.param_groups"], [0, 1])
    first = changed(checkpoint, dropped, {"optimizer_states.0.param_groups": groups})
    assert list(first.slots["exp_avg"]) == ["l1.weight", "l1.bias"]
    twins: dict[str, LazyTensor | None] = {"state_dict.l2.weight": numbers(4, 4), "state_dict.l2.bias": numbers(4)}
    with pytest.raises(MappingError, match="more than one choice fits their shapes"):
        changed(checkpoint, {**dropped, **twins}, {"optimizer_states.0.param_groups": groups})


def test_groups_of_unknown_division_are_refused() -> None:
    checkpoint = opened(NEMO_TOY)
    (group,) = checkpoint.objects["optimizer_states.0.param_groups"]
    halves = [{**group, "params": [0, 1]}, {**group, "params": [2, 3]}]
    with pytest.raises(MappingError, match="nothing tells which parameters are in which group.*groups of 2, 2"):
        changed(checkpoint, {}, {"optimizer_states.0.param_groups": halves})
    with pytest.raises(MappingError, match="do not list each of its parameters once"):
        changed(checkpoint, {}, {"optimizer_states.0.param_groups": [{**group, "params": [0, 1, 2]}]})
    with pytest.raises(MappingError, match="not a list of groups"):
        changed(checkpoint, {}, {"optimizer_states.0.param_groups": 3})
    with pytest.raises(MappingError, match="do not list each of its parameters once"):
        changed(checkpoint, {}, {"optimizer_states.0.param_groups": [{**group, "params": [[0], {}, None]}]})
    named = [{**group, "param_names": ["nowhere"] * len(group["params"])}]  # of another model
    changed(checkpoint, {}, {"optimizer_states.0.param_groups": named})


def test_a_wrapped_optimizer_brings_masters() -> None:
    """As NeMo 1 writes with ``megatron_amp_O2``; what is fp32 itself has no master and no place in the list."""
    checkpoint = opened(NEMO_TOY)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("state_dict.") and not name.endswith("l1.bias"):
            tensors[name] = tensor.cast("bfloat16")
        elif name.startswith("state_dict."):
            tensors[name] = tensor
        elif name.startswith("optimizer_states.0."):
            tensors[name.replace("states.0.", "states.0.optimizer.")] = tensor
    masters = {"l1.weight": numbers(4, 4), "l2.weight": numbers(2, 4), "l2.bias": numbers(2)}
    for index, master in enumerate(masters.values()):
        tensors[f"optimizer_states.0.fp32_from_fp16_params.0.{index}"] = master
    objects = {"optimizer_states.0.optimizer.param_groups": checkpoint.objects["optimizer_states.0.param_groups"]}
    wrapped = replace(checkpoint, tensors=tensors, objects=objects, optimizer=None)
    assert state_of(with_optimizer(wrapped)).slots["master"] == masters
    del tensors["optimizer_states.0.fp32_from_fp16_params.0.2"]
    with pytest.raises(MappingError, match="not one master weight for each 16-bit parameter.*expected 3, found 2"):
        state_of(with_optimizer(wrapped))


# -- by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lightning_fsdp2", "lightning_tp"])
def test_named_state_of_lightning_is_what_was_written(case: str) -> None:
    checkpoint = opened(f"nemo/{case}/m-step=2.ckpt")
    state = state_of(checkpoint)
    trained = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    for slot in ("exp_avg", "exp_avg_sq"):
        stored = {name: checkpoint.tensors[f"optimizer_0.state.{name}.{slot}"] for name in trained}
        assert {name: sha256_of(t) for name, t in state.slots[slot].items()} == {
            name: sha256_of(t) for name, t in stored.items()
        }
    assert state.step == 2
    assert state.group_of == dict.fromkeys(trained, 0)
    assert state.groups[0]["weight_decay"] == 0.01


def test_names_of_a_wrapped_model_are_found() -> None:
    state = state_of(opened("mcore/dcp_fsdp_w2/ckpt"))
    assert list(state.slots["exp_avg"]) == ["layers.0.weight"]
    assert state.groups == ({"lr": 0.001, "betas": (0.9, 0.95)},)


def named(names: dict[str, LazyTensor], objects: dict[str, Any] | None = None) -> OptimizerState:
    weights: dict[str, LazyTensor] = {"m.a.weight": numbers(2, 3), "m.a.bias": numbers(2)}
    prefixes = ("optim.", "optimizer.")
    return state_of(
        with_optimizer(Checkpoint("x", "dcp", {**weights, **names}, state_prefixes=prefixes, objects=objects or {}))
    )


def test_groups_by_name_are_put_together() -> None:
    slots = {"optim.state.a.weight.exp_avg": numbers(2, 3), "optim.state.a.bias.exp_avg": numbers(2)}
    groups = {"optim.param_groups.a.weight.lr": 0.1, "optim.param_groups.a.bias.lr": 0.2}
    state = named(dict(slots), groups)
    assert state.groups == ({"lr": 0.1}, {"lr": 0.2})
    assert state.group_of == {"m.a.weight": 0, "m.a.bias": 1}
    assert len(named(dict(slots), dict.fromkeys(groups, 0.1)).groups) == 1
    fsdp = {name.replace("optim.param_groups", "optimizer.param_to_group_meta"): v for name, v in groups.items()}
    own = {name.replace("optim.", "optimizer."): tensor for name, tensor in slots.items()}
    assert named(own, fsdp).group_of == {"m.a.weight": 0, "m.a.bias": 1}


def test_names_that_are_no_weights() -> None:
    with pytest.raises(MappingError, match="the optimizer's names are not the weights'"):
        named({"optim.state.b.weight.exp_avg": numbers(2, 3)})
    with pytest.raises(MappingError, match=r"expected \(2, 3\), found \(6,\)"):
        named({"optim.state.a.weight.exp_avg": numbers(6)})
    with pytest.raises(MappingError, match="is trained by several optimizers"):
        named(
            {"optim.state.a.weight.exp_avg": numbers(2, 3), "optimizer.state.a.weight.exp_avg_sq": numbers(2, 3)},
        )


def test_steps_that_differ_stay_with_their_parameters() -> None:
    steps = {f"optim.state.a.{name}.step": from_array(np.array(n)) for n, name in enumerate(("bias", "weight"))}
    state = named(steps)
    assert state.step is None
    assert {name: int(step.numpy()) for name, step in state.others["step"].items()} == {"m.a.weight": 1, "m.a.bias": 0}


def test_a_checkpoint_without_state_stays_itself() -> None:
    checkpoint = registry.read(str(fixture_path("mcore/torchdist_plain_w1/ckpt")))
    assert with_optimizer(checkpoint) is checkpoint
