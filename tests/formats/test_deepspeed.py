"""DeepSpeed's folders, laid out as its engine lays them out: the partitions of all ranks become whole parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.support import file_bytes

from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.formats import registry
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import from_array

SHAPES: tuple[dict[str, tuple[int, ...]], ...] = (
    {"up.weight": (5, 3), "embed.weight": (7, 3)},
    {"norm.weight": (3,), "up.bias": (5,), "norm.bias": (3,)},
)
"""Of each group, in an order that is not the modules'."""
FROZEN = np.arange(10, dtype=np.float32).reshape(2, 5) + 500
ORDER = ["embed.weight", "frozen.weight", "up.weight", "up.bias", "norm.weight", "norm.bias", "scale", "head.weight"]


@pytest.fixture
def anyckpt(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def arrays(start: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group in SHAPES:
        for name, shape in group.items():
            count = int(np.prod(shape))
            found[name] = (np.arange(count, dtype=np.float32) + start).reshape(shape)
            start += count
    return found


WEIGHTS, MEANS, SQUARES = arrays(0), arrays(1000), arrays(2000)


def save(path: Path, value: Any) -> None:
    def lazy(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return from_array(np.ascontiguousarray(item))
        if isinstance(item, dict):
            return {key: lazy(own) for key, own in item.items()}
        return [lazy(own) for own in item] if isinstance(item, list) else item

    path.write_bytes(file_bytes(OutputFile("", zip_parts(lazy(value)))))


def padded(array: Any, length: int) -> Any:
    return np.concatenate([array, np.full(length - len(array), -1, array.dtype)])


def flat_groups(values: dict[str, Any], world: int, padding: int) -> list[list[Any]]:
    """Stages 1 and 2: of each rank, its share of each group."""
    ranks: list[list[Any]] = [[] for _ in range(world)]
    for group in SHAPES:
        whole = np.concatenate([padded(values[name].reshape(-1), values[name].size + padding) for name in group])
        step = -(-len(whole) // (2 * world)) * 2
        for rank, part in enumerate(np.split(padded(whole, step * world), world)):
            ranks[rank].append(part)
    return ranks


def flat_pieces(values: dict[str, Any], world: int) -> list[list[Any]]:
    """Stage 3: of each rank, its share of each parameter, in sub-groups."""
    ranks: list[list[Any]] = [[] for _ in range(world)]
    for group in SHAPES:
        pieces: list[list[Any]] = [[] for _ in range(world)]
        for name in group:
            step = -(-values[name].size // world)
            for rank, part in enumerate(np.split(padded(values[name].reshape(-1), step * world), world)):
                pieces[rank].append(part)
        for rank in range(world):
            ranks[rank].append(np.concatenate(pieces[rank]))
    return ranks


def model(to: Path, stage: int, world: int = 2, *, padding: int = 0, lean: bool = True) -> Path:
    root = to / f"zero{stage}"
    folder = root / "global_step3"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step3")
    (root / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    third = stage == 3
    divided = [flat_pieces(v, world) if third else flat_groups(v, world, padding) for v in (WEIGHTS, MEANS, SQUARES)]
    for rank in range(world):
        weights, means, squares = (ranks[rank] for ranks in divided)
        state = {
            n: {"exp_avg": m, "exp_avg_sq": s, "step": 3} for n, (m, s) in enumerate(zip(means, squares, strict=True))
        }
        groups = [{"lr": 0.1, "weight_decay": 0.1 * (1 - n), "params": [n]} for n in range(2)]
        inner = {"state": state, "param_groups": groups}
        if third:
            own = {
                "zero_stage": 3,
                "partition_count": world,
                "optimizer_state_dict": inner,
                "fp32_flat_groups": weights,
            }
        else:
            if lean and rank == world - 1:  # padding at the end is taken off the weights, and left on the moments
                used = [sum(int(np.prod(shape)) + padding for shape in group.values()) for group in SHAPES]
                weights = [w[: n - rank * len(w)] for w, n in zip(weights, used, strict=True)]
            own = {"zero_stage": stage, "partition_count": [world] * 2, "base_optimizer_state": inner}
            own["single_partition_of_fp32_groups"] = weights
            if padding:
                own["param_alignment_paddings"] = [[padding] * len(group) for group in SHAPES]
        prefix = f"bf16_zero_pp_rank_{rank}_mp_rank_00"
        save(folder / f"{prefix}_optim_states.pt", {"optimizer_state_dict": own, "ds_version": "0.16.0"})
    for rank in range(world if third else 1):
        module = {name: np.zeros(0 if third else WEIGHTS[name].shape, np.float16) for name in ORDER if name in WEIGHTS}
        fragment = np.array_split(padded(FROZEN.reshape(-1), -(-10 // world) * world), world)[rank] if third else FROZEN
        module["frozen.weight"] = np.zeros(0, np.float32) if third else FROZEN
        module["scale"] = np.full(2, 0.5, np.float16)
        module["head.weight"] = np.zeros(0, np.float16) if third else np.zeros((7, 3), np.float16)
        states = {
            "module": {name: module[name] for name in ORDER},
            "buffer_names": ["scale"],
            "param_shapes": [dict(group) for group in SHAPES],
            "frozen_param_shapes": {"frozen.weight": (2, 5)},
            "frozen_param_fragments": {"frozen.weight": fragment},
            "shared_params": {"head.weight": "embed.weight"},
            "global_steps": 3,
            "dp_world_size": world,
            "ds_version": "0.16.0",
        }
        save(folder / f"{f'zero_pp_rank_{rank}_' if third else ''}mp_rank_00_model_states.pt", states)
    return root


CASES = [
    (1, 1, 0, True), (2, 2, 0, True), (2, 3, 0, False), (2, 3, 1, True), (1, 4, 0, True), (3, 1, 0, True),
    (3, 2, 0, True), (3, 3, 0, True), (3, 5, 0, True),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "world", "padding", "lean"), CASES)
def test_partitions_become_parameters(
    stage: int, world: int, padding: int, lean: bool, tmp_path: Path, anyckpt: Runner
) -> None:
    root = model(tmp_path, stage, world, padding=padding, lean=lean)
    opened = registry.read(root)
    assert opened.format == "deepspeed"
    assert opened.format_version == f"0.16.0 ZeRO stage {stage}"
    assert (opened.details["world_size"], opened.training.step) == (world, 3)
    weights = opened.weights()
    assert list(weights) == ORDER
    assert weights["scale"].dtype.name == "float32"
    assert weights["frozen.weight"].numpy().tolist() == FROZEN.tolist()
    assert weights["head.weight"].numpy().tolist() == WEIGHTS["embed.weight"].tolist()
    for name, array in WEIGHTS.items():
        assert weights[name].numpy().tolist() == array.tolist(), name
    found = with_optimizer(opened).optimizer
    assert found is not None
    state = found()
    assert state.step == 3
    for slot, values in (("exp_avg", MEANS), ("exp_avg_sq", SQUARES)):
        assert {n: t.numpy().tolist() for n, t in state.slots[slot].items()} == {
            n: a.tolist() for n, a in values.items()
        }
    assert [group["weight_decay"] for group in state.groups] == [0.1, 0.0]
    assert state.group_of == {name: number for number, group in enumerate(SHAPES) for name in group}
    assert anyckpt("verify", root).code == 0
    assert anyckpt("convert", root, tmp_path / "out", "--to", "safetensors").code == 0
    assert anyckpt("diff", root, tmp_path / "out", "--weights-only").code == 0


def test_the_saves_own_folder(tmp_path: Path) -> None:
    opened = registry.read(model(tmp_path, 3) / "global_step3")
    assert opened.config == {"model_type": "nobodys"}
    assert list(opened.weights()) == ORDER


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_1_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_one_file_is_no_model(name: str, tmp_path: Path, anyckpt: Runner) -> None:
    path = model(tmp_path, 3) / "global_step3" / name
    shown = anyckpt("inspect", path)
    assert shown.code == 0
    assert "DeepSpeed ZeRO" in shown.err
    assert (
        "open the folder that holds the files of all ranks"
        in anyckpt("convert", path, tmp_path / "o", "--to", "torch").error
    )
    assert anyckpt("verify", path).code == 1


def states(root: Path, rank: int, kind: str = "optim") -> Path:
    (found,) = (root / "global_step3").glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_ranks(stage: int, tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, stage, 3)
    states(root, 2).unlink()
    assert "the optimizer's files are not those of all ranks" in anyckpt("verify", root).damage
    states(root, 0).unlink()
    error = anyckpt("convert", root, tmp_path / "o", "--to", "torch").error
    assert "the file of rank 0 is missing" in error


def test_a_missing_model_state_of_stage_three(tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, 3)
    states(root, 1, "model").unlink()
    assert "another number of ranks than the optimizer's" in anyckpt("verify", root).damage


@pytest.mark.parametrize("stage", [2, 3])
def test_another_world_size(stage: int, tmp_path: Path, anyckpt: Runner) -> None:
    root, other = model(tmp_path / "a", stage, 2), model(tmp_path / "b", stage, 3)
    shutil.copy(states(other, 1), states(root, 1))
    assert "not of one save" in anyckpt("verify", root).damage or "do not hold" in anyckpt("verify", root).damage


def test_a_rank_of_another_model(tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, 3)
    path = states(root, 1, "model")
    save(path, {"module": {}, "param_shapes": [{"other.weight": (2, 2)}], "ds_version": "0.16.0"})
    error = anyckpt("verify", root).damage
    assert "tensor 'other.weight': its parameters are not those of rank 0" in error


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mp_rank_01_model_states.pt", "model-parallel ranks"),
        ("layer_00-model_00-model_states.pt", "pipeline stages"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "different experts"),
    ],
)
def test_divided_models_are_refused_by_name(name: str, problem: str, tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, 2)
    shutil.copy(root / "global_step3/mp_rank_00_model_states.pt", root / "global_step3" / name)
    assert problem in anyckpt("convert", root, tmp_path / "o", "--to", "torch").error


def test_a_universal_checkpoint(tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, 2)
    for path in (root / "global_step3").glob("*optim_states.pt"):
        path.unlink()
    for name, weight in WEIGHTS.items():
        inner = root / "global_step3/zero" / name
        inner.mkdir(parents=True)
        for slot, values in (("fp32", weight), ("exp_avg", MEANS[name]), ("exp_avg_sq", SQUARES[name])):
            save(inner / f"{slot}.pt", {"param": values})
        save(inner / "step.pt", 3)
    opened = registry.read(root)
    assert opened.details["stage"] == "universal"
    assert list(opened.weights()) == ORDER
    assert all(opened.weights()[name].numpy().tolist() == array.tolist() for name, array in WEIGHTS.items())
    found = with_optimizer(opened).optimizer
    assert found is not None
    assert found().step == 3
    assert found().slots["exp_avg"]["up.bias"].numpy().tolist() == MEANS["up.bias"].tolist()
    (root / "global_step3/zero/up.bias/fp32.pt").unlink()
    assert "tensor 'up.bias': has no weight" in anyckpt("verify", root).damage


def test_experts_cut_over_fewer_ranks_are_refused(tmp_path: Path, anyckpt: Runner) -> None:
    root = model(tmp_path, 2)
    for count, problem in (([2, 1], "different numbers of ranks, as those of experts"), ([[], {}], "not those of all")):
        state = {"zero_stage": 2, "partition_count": count, "single_partition_of_fp32_groups": []}
        save(states(root, 0), {"optimizer_state_dict": state})
        assert problem in anyckpt("verify", root).damage


def test_a_hugging_face_folder_says_what_it_leaves_to_deepspeed(tmp_path: Path) -> None:
    root = model(tmp_path, 2)
    assert not any("global_step3" in text for text in registry.read(root).warnings)
    parts = safetensors_parts({"embed.weight": from_array(WEIGHTS["embed.weight"].astype(np.float16))})
    (root / "model.safetensors").write_bytes(file_bytes(OutputFile("", parts)))
    opened = registry.read(root)
    assert opened.format == "hf"
    assert opened.training.has_optimizer
    assert "training state that is not read: global_step3" in opened.warnings
