"""Optimizer state of Megatron-LM checkpoints by parameter: against what Megatron-Core's optimizers held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, open_layout, root_of, write_torch
from tests.operations.test_open import hub_spelling
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.containers.torch_file import read_torch
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_lm import FORMAT
from anyckpt.layout import Parallelism
from anyckpt.operations.steps.cutting import cut_for_ranks
from anyckpt.operations.steps.joining import open_checkpoint, parallelism_of
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import LazyTensor

WITH_OPTIMIZER = ("gpt_tp2_pp2", "gpt_fp32_optim_tp2", "distopt_tp2_dp2")
SLOTS = ("master", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_slots_are_those_of_the_parameters(name: str) -> None:
    expected = expected_of(f"legacy/megatron_{name}")
    checkpoint = open_checkpoint(fixture_path(f"legacy/megatron_{name}"))
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    assert set(state.slots) == set(SLOTS)
    for slot in SLOTS:
        facts = {key: own[slot] for key, own in expected["optimizer"].items() if slot in own}
        if name == "gpt_fp32_optim_tp2" and slot == "master":  # the weights are their own masters
            facts = expected["global_tensors"]
        assert_tensors_equal_expected(state.slots[slot], hub_spelling(facts))
    assert state.step == expected["optimizer_step"]
    assert [group["wd_mult"] for group in state.groups] == [1.0, 0.0]
    assert all("params" not in group for group in state.groups)
    assert set(state.slots["master"]) == set(checkpoint.tensors)


def test_a_checkpoint_without_optimizer_has_none() -> None:
    assert open_checkpoint(fixture_path("legacy/megatron_moe_tp2_ep2")).optimizer is None


def damaged(name: str, tmp_path: Path, change: Callable[[dict[Any, Any]], None], file: str = FILE) -> str:
    """The error from reading the optimizer after a change to every rank."""
    root = copy_fixture(f"megatron_{name}", tmp_path)
    for path in root.glob(f"iter_*/*/{file}"):
        change_rank(path, change)
    checkpoint = open_checkpoint(root)  # the weights are sound
    assert checkpoint.optimizer is not None
    with pytest.raises(MappingError) as error:
        checkpoint.optimizer()
    assert "--optimizer drop" in str(error.value)
    return str(error.value)


def swap_groups(contents: dict[Any, Any]) -> None:
    """As Megatron-Core before 0.16 orders groups where the first parameter is a norm."""
    optimizer = contents["optimizer"]
    decay, rest = optimizer["optimizer"]["param_groups"]
    state, count = optimizer["optimizer"]["state"], len(rest["params"])
    number = {old: new for new, old in enumerate([*rest["params"], *decay["params"]])}
    optimizer["optimizer"]["state"] = {number[index]: value for index, value in state.items()}
    decay["params"], rest["params"] = list(range(count, len(number))), list(range(count))
    optimizer["optimizer"]["param_groups"] = [rest, decay]
    optimizer["fp32_from_fp16_params"].reverse()


def test_the_order_of_groups_does_not_matter(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_tp2_pp2", tmp_path)
    for number, path in enumerate(sorted(root.glob(f"iter_*/*/{FILE}"))):
        if number % 2:
            change_rank(path, swap_groups)
    ours, theirs = (
        open_checkpoint(root).optimizer,
        open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2")).optimizer,
    )
    assert ours is not None and theirs is not None
    for slot in SLOTS:
        assert {k: sha256_of(v) for k, v in ours().slots[slot].items()} == {
            k: sha256_of(v) for k, v in theirs().slots[slot].items()
        }


def old_names(contents: dict[Any, Any]) -> None:
    optimizer = contents["optimizer"]
    optimizer["optimizer_state_dict"] = optimizer.pop("optimizer")
    optimizer["fp32_from_fp16"] = optimizer.pop("fp32_from_fp16_params")
    for group in optimizer["optimizer_state_dict"]["param_groups"]:
        group["weight_decay"] *= group.pop("wd_mult")
        for key in ("is_expert_parallel", "default_config", "lr_mult", "is_decoupled_lr"):
            group.pop(key)
        group["step"] = 7
    for one in optimizer["optimizer_state_dict"]["state"].values():
        one.pop("step")  # as apex keeps it: per group


def test_old_key_names_and_steps_by_group(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_tp2_pp2", tmp_path)
    for path in root.glob(f"iter_*/*/{FILE}"):
        change_rank(path, old_names)
    ours, theirs = (
        open_checkpoint(root).optimizer,
        open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2")).optimizer,
    )
    assert ours is not None and theirs is not None
    found = ours()
    assert found.step == 7
    assert {k: sha256_of(v) for k, v in found.slots["exp_avg"].items()} == {
        k: sha256_of(v) for k, v in theirs().slots["exp_avg"].items()
    }


def test_counts_that_do_not_add_up(tmp_path: Path) -> None:
    text = damaged(
        "gpt_tp2_pp2", tmp_path, lambda contents: contents["optimizer"]["optimizer"]["param_groups"][1]["params"].pop()
    )
    assert "parameter group 1" in text
    assert "expected 6 parameters" in text
    assert "found 5" in text


def test_masters_that_do_not_add_up(tmp_path: Path) -> None:
    text = damaged("gpt_tp2_pp2", tmp_path, lambda contents: contents["optimizer"]["fp32_from_fp16_params"][0].pop())
    assert "float32 weights of parameter group 0" in text


def test_states_of_another_shape(tmp_path: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        state = contents["optimizer"]["optimizer"]["state"]
        state[0], state[1] = state[1], state[0]

    assert "exp_avg does not fit its parameter" in damaged("gpt_tp2_pp2", tmp_path, change)


def test_a_state_that_is_missing(tmp_path: Path) -> None:
    text = damaged("gpt_tp2_pp2", tmp_path, lambda contents: contents["optimizer"]["optimizer"]["state"].pop(3))
    assert "has no state for a parameter" in text


def test_half_precision_without_masters(tmp_path: Path) -> None:
    text = damaged("gpt_tp2_pp2", tmp_path, lambda contents: contents["optimizer"].pop("fp32_from_fp16_params"))
    assert "has no float32 weights" in text


def test_a_group_for_no_parameter(tmp_path: Path) -> None:
    text = damaged("gpt_tp2_pp2", tmp_path, lambda contents: contents["optimizer"]["optimizer"]["param_groups"].pop(1))
    assert "no group for a parameter" in text


def test_an_optimizer_without_groups(tmp_path: Path) -> None:
    text = damaged("gpt_tp2_pp2", tmp_path, lambda contents: contents.update(optimizer={"optimizer": {}}))
    assert "no parameter groups" in text


def test_different_steps(tmp_path: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        contents["optimizer"]["optimizer"]["state"][2]["step"] = 8

    assert "different numbers of optimizer steps (found 7, 8)" in damaged("gpt_tp2_pp2", tmp_path, change)


def buffer(contents: dict[Any, Any]) -> dict[str, Any]:
    found = next(iter(contents[0].values()))
    assert isinstance(found, dict)
    return found


def test_buffers_of_another_size(tmp_path: Path) -> None:
    def change(contents: dict[Any, Any]) -> None:
        flat = buffer(contents)
        for key in ("param", "exp_avg", "exp_avg_sq"):
            flat[key] = flat[key].narrow(0, 0, 1471)
        flat["numel_unpadded"] = 1471

    text = damaged("distopt_tp2_dp2", tmp_path, change, "distrib_optim.pt")
    assert "expected 1472 or" in text
    assert "found 1471" in text


def test_buffers_that_are_malformed(tmp_path: Path) -> None:
    changes: list[tuple[Callable[[dict[Any, Any]], None], str]] = [
        (lambda contents: contents.pop("buckets_coalesced"), "found 1472 elements in 1 buckets"),
        (lambda contents: contents.pop(0), "of a layout that is not understood"),
        (lambda contents: contents.update({1: contents[0]}), "do not fit the model's parameters"),
        (lambda contents: buffer(contents).pop("exp_avg"), "has no whole exp_avg"),
        (lambda contents: buffer(contents).update(numel_unpadded=10), "has no whole master"),
        (lambda contents: contents.update({0: {"bf16": {}}}), "is malformed"),
    ]
    for number, (change, words) in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        assert words in damaged("distopt_tp2_dp2", tmp_path / str(number), change, "distrib_optim.pt")


def test_distributed_optimizer_without_its_file(tmp_path: Path) -> None:
    root = copy_fixture("megatron_distopt_tp2_dp2", tmp_path)
    for path in root.glob("*/*/distrib_optim.pt"):
        path.unlink()
    checkpoint = open_checkpoint(root)
    assert checkpoint.optimizer is not None
    with pytest.raises(MappingError, match="state is not in the model's file"):
        checkpoint.optimizer()


def test_rows_of_old_versions_are_reordered_in_every_slot(tmp_path: Path) -> None:
    """The same state beside version 0's and version 3's weights is the same state afterwards."""
    digests = []
    for version in (0, 3):
        root = copy_fixture(f"megatron_oldnames_v{version}", tmp_path)
        for path in root.glob(f"iter_*/*/{FILE}"):
            contents = root_of(path)
            contents["optimizer"] = adam_of(contents["model"]["language_model"])
            write_torch(path, contents)
        optimizer = open_checkpoint(root).optimizer
        assert optimizer is not None
        digests.append({slot: {k: sha256_of(v) for k, v in own.items()} for slot, own in optimizer().slots.items()})
    assert digests[0] == digests[1]


def adam_of(model: dict[str, Any]) -> dict[str, Any]:
    """Adam's state whose moments are the weights themselves, in the weights' own order of rows."""
    embedding = model["embedding"]
    stack = model.get("transformer", model.get("encoder"))
    assert isinstance(stack, dict)
    named = {
        "word.weight": embedding["word_embeddings"]["weight"],
        "position.weight": embedding["position_embeddings"]["weight"],
        **stack,
    }
    decay = [t for name, t in named.items() if t.ndim > 1]
    rest = [t for name, t in named.items() if t.ndim == 1]
    state = {i: {"step": 1, "exp_avg": t, "exp_avg_sq": t} for i, t in enumerate([*decay, *rest])}
    groups = [
        {"weight_decay": 0.01, "params": list(range(len(decay)))},
        {"weight_decay": 0.0, "params": list(range(len(decay), len(state)))},
    ]
    return {"state": state, "param_groups": groups}


# -- written again ---------------------------------------------------------------------------------------------


def facts(value: Any) -> Any:
    """A tree with tensors as what they hold."""
    if isinstance(value, LazyTensor):
        return value.dtype.name, value.shape, sha256_of(value)
    if isinstance(value, dict):
        return {key: facts(part) for key, part in value.items()}
    return [facts(part) for part in value] if isinstance(value, (list, tuple)) else value


def written(checkpoint: Checkpoint, parallelism: Parallelism, path: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(cut_for_ranks(checkpoint, parallelism), WriteOptions()), path)


@pytest.mark.parametrize("name", ["gpt_tp2_pp2", "gpt_fp32_optim_tp2"])
def test_joined_and_cut_again_it_is_what_megatron_wrote(name: str, tmp_path: Path) -> None:
    source = fixture_path(f"legacy/megatron_{name}")
    checkpoint = open_checkpoint(source)
    output = written(checkpoint, parallelism_of(open_layout(source)), tmp_path / "out")
    for path in sorted(source.glob(f"iter_*/*/{FILE}")):
        ours = facts(root_of(output / path.relative_to(source))["optimizer"])
        theirs = facts(root_of(path)["optimizer"])
        for group in ours.get("optimizer", ours)["param_groups"]:
            assert group.pop("step") == 7  # for fused optimizers, beside torch's own
        assert ours == theirs


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
@pytest.mark.parametrize(
    "parallelism",
    [
        Parallelism(),
        Parallelism(tensor_parallel=4),
        Parallelism(pipeline_parallel=2),
        Parallelism(tensor_parallel=2, pipeline_parallel=2),
    ],
)
def test_another_layout_holds_the_same_state(name: str, parallelism: Parallelism, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fixture_path(f"legacy/megatron_{name}"))
    again = open_checkpoint(written(checkpoint, parallelism, tmp_path / "out"))
    assert checkpoint.optimizer is not None and again.optimizer is not None
    before, after = checkpoint.optimizer(), again.optimizer()
    assert after.step == before.step
    assert facts(after.slots) == facts(before.slots)


def test_steps_are_storages_of_their_own(tmp_path: Path) -> None:
    """Adam counts them up in place: one shared storage would count every parameter's."""
    checkpoint = open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    output = written(checkpoint, Parallelism(), tmp_path / "out")
    contents = read_torch(LocalFile(output / "iter_0000007" / "mp_rank_00" / FILE))
    states = contents.root["optimizer"]["optimizer"]["state"].values()
    storages = {contents.facts_of(state["step"]).storage for state in states}
    assert len(storages) == len(states) == 30


def experts_state(name: str, tmp_path: Path) -> Checkpoint:
    """A model with experts, and an optimizer's state whose moments are its weights."""
    checkpoint = open_checkpoint(fixture_path(f"legacy/megatron_{name}"))
    slots = {slot: {key: tensor.cast("float32") for key, tensor in checkpoint.tensors.items()} for slot in SLOTS}
    return replace(
        checkpoint,
        optimizer=lambda: OptimizerState(slots=slots, step=3),
        training=replace(checkpoint.training, has_optimizer=True),
    )


def test_experts_have_an_optimizer_of_their_own(tmp_path: Path) -> None:
    checkpoint = experts_state("moe_tp2_ep2", tmp_path)
    output = written(checkpoint, Parallelism(tensor_parallel=2, expert_parallel=2), tmp_path / "out")
    dense, experts = root_of(output / "iter_0000007" / "mp_rank_01_001" / FILE)["optimizer"]
    for container, of_expert, factors in ((dense, False, [1.0, 0.0]), (experts, True, [1.0])):
        groups = container["optimizer"]["param_groups"]
        assert [group["wd_mult"] for group in groups] == factors
        assert all(group["is_expert_parallel"] is of_expert for group in groups)
        assert groups[0]["lr"] == 0.001
        assert groups[0]["betas"] == (0.9, 0.95)
    assert len(experts["optimizer"]["state"]) == 2 * 2 * 2
    again = open_checkpoint(output)
    assert checkpoint.optimizer is not None and again.optimizer is not None
    assert facts(again.optimizer().slots) == facts(checkpoint.optimizer().slots)
    assert again.optimizer().step == 3


def test_a_whole_model_is_written_with_its_state(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fixture_path("legacy/megatron_gpt_fp32_optim_tp2"))
    assert FORMAT.plan is not None
    output = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "out")
    again = open_checkpoint(output)
    assert checkpoint.optimizer is not None and again.optimizer is not None
    assert facts(again.optimizer().slots) == facts(checkpoint.optimizer().slots)


def test_state_that_lacks_a_parameter_is_not_written(tmp_path: Path) -> None:
    checkpoint = experts_state("moe_tp2_ep2", tmp_path)
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    del state.slots["exp_avg"]["decoder.final_layernorm.weight"]
    with pytest.raises(MappingError, match="exp_avg does not fit its parameter"):
        written(replace(checkpoint, optimizer=lambda: state), Parallelism(), tmp_path / "out")


def test_dropped_state_is_not_written(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    dropped = replace(checkpoint, training=replace(checkpoint.training, has_optimizer=False))
    output = written(dropped, Parallelism(), tmp_path / "out")
    assert "optimizer" not in root_of(output / "iter_0000007" / "mp_rank_00" / FILE)
