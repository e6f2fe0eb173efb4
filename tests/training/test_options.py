"""Every option of saving and loading has the effect that it says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer

MIB = 1 << 20


def copies_saved(path: str, settings: dict[str, Any], groups: list[list[int]]) -> int:
    """Save what all ranks have alike; the bytes that this one wrote."""
    import torch
    import torch.distributed as dist

    import anyckpt.torch

    made = [dist.new_group(ranks) for ranks in groups]
    own = next((made[number] for number, ranks in enumerate(groups) if dist.get_rank() in ranks), None)
    state = {f"w{n}": torch.full((MIB // 4,), float(n)) for n in range(8)}
    return anyckpt.torch.save(state, path, within=own, **settings).bytes_written


def test_copies_are_shared_out_evenly_by_bytes(tmp_path: Path) -> None:
    shared = on_ranks(2, copies_saved, str(tmp_path / "shared"), {}, [])
    assert all(4 * MIB < nbytes < 4.2 * MIB for nbytes in shared)
    alone = on_ranks(2, copies_saved, str(tmp_path / "alone"), {"parallel_save": False}, [])
    assert alone[0] > 8 * MIB
    assert alone[1] == 0


def test_copies_are_shared_within_a_group(tmp_path: Path) -> None:
    found = on_ranks(4, copies_saved, str(tmp_path / "c"), {}, [[0, 2], [1, 3]])
    assert [nbytes > 4 * MIB for nbytes in found] == [True, False, True, False]


def test_one_large_tensor_is_shared_out_in_parts(tmp_path: Path) -> None:
    written = on_ranks(2, large_copy, str(tmp_path / "c"))
    assert all(31 * MIB < nbytes < 33 * MIB for nbytes in written)


def large_copy(path: str) -> int:
    import torch

    import anyckpt.torch

    report = anyckpt.torch.save({"w": torch.arange(16 * MIB, dtype=torch.float32)}, path)
    other = {"w": torch.zeros(16 * MIB)}
    anyckpt.torch.load(other, path)
    assert torch.equal(other["w"], torch.arange(16 * MIB, dtype=torch.float32))
    return report.bytes_written


def differing(path: str, settings: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.errors import MappingError

    state = {"w": torch.zeros(2), "seed": dist.get_rank() + 5}
    try:
        anyckpt.torch.save(state, path, **settings)
    except MappingError as error:
        return error.problem.partition(" (on rank")[0]
    return anyckpt.torch.load(path)["seed"]


def test_objects_that_differ_are_refused_unless_the_first_will_do(tmp_path: Path) -> None:
    assert set(on_ranks(2, differing, str(tmp_path / "c"), {})) == {
        "an object differs between ranks, and one of them would be lost"
    }
    assert on_ranks(2, differing, str(tmp_path / "c"), {"check_objects": False}) == [5, 5]


def saved_often(folder: str, form: str, settings: dict[str, Any]) -> list[Any]:
    """Save a state that changes in its contents alone, then in more than that."""
    import random

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import anyckpt.torch

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = {f"w{n}": distribute_tensor(torch.zeros(9, 5), mesh, [Shard(n % 2)]) for n in range(4)}
    told = []
    for step in range(5):
        for number, tensor in enumerate(weights.values()):
            tensor.to_local().fill_(10 * step + number)
        state: dict[str, Any] = {"model": dict(weights), "step": step, "lr": 0.1 / (step + 1)}
        if step == 3:
            state["random"] = random.Random(0).getstate()  # another object
        if step == 4:
            state["model"]["more"] = torch.ones(3)
        path = os.path.join(folder, f"step{step}")
        report = anyckpt.torch.save(state, path, format=form, assume_constant_structure=True, **settings)
        other = {"model": {name: torch.zeros(9, 5) for name in weights}}
        found = anyckpt.torch.load(other, path, strictness="ignore_all" if form != "dcp" else "raise_unexpected")
        assert not found.unexpected
        for number, tensor in enumerate(other["model"].values()):
            assert torch.equal(tensor, torch.full((9, 5), 10.0 * step + number))
        if form == "dcp":
            assert anyckpt.torch.load(path)["step"] == step
        told.append(report.planned)
    return told


def other_options(folder: str) -> list[Any]:
    import torch
    import torch.distributed as dist

    import anyckpt.torch

    told = []
    for step, config in enumerate(({"a": 1}, {"a": 1}, {"a": 2})):
        state = {"w": torch.ones(2)}
        if step == 1 and dist.get_rank() == 1:
            state["of one rank"] = torch.ones(2)
        path = os.path.join(folder, f"step{step}")
        report = anyckpt.torch.save(state, path, format="hf", config=config, assume_constant_structure=True)
        told.append(report.planned)
    return told


def test_a_plan_serves_the_same_options_and_tensors_only(tmp_path: Path) -> None:
    import json

    assert on_ranks(2, other_options, str(tmp_path)) == [[True, True, True]] * 2
    assert json.loads((tmp_path / "step2/config.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("form", ["dcp", "megatron-core", "safetensors"])
def test_a_constant_structure_is_planned_once(tmp_path: Path, form: str) -> None:
    import anyckpt

    planned = on_ranks(2, saved_often, str(tmp_path), form, {})
    assert planned == [[True, False, False, True, True]] * 2
    for step in range(5):
        assert anyckpt.verify(tmp_path / f"step{step}")


def threads_of(path: str, workers: int) -> int:
    import torch

    import anyckpt.torch
    from anyckpt.engine import run

    started = []
    really = run.Run._work

    def work(self: Any, jobs: Any) -> None:
        started.append(1)
        really(self, jobs)

    run.Run._work = work  # type: ignore[method-assign]
    anyckpt.torch.save({"w": torch.zeros(3)}, path, workers=workers, overwrite=True)
    return len(started)


def test_so_many_threads_write(tmp_path: Path) -> None:
    assert threads_of(str(tmp_path / "c"), 3) == 3 * threads_of(str(tmp_path / "c"), 1)


def test_files_of_a_size(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch

    state = {f"w{n}": torch.zeros(MIB // 4) for n in range(4)}
    anyckpt.torch.save(state, tmp_path / "c", max_shard_size=2 * MIB)
    assert len(list((tmp_path / "c").glob("*.distcp"))) > 2
    anyckpt.torch.save(state, tmp_path / "hf", format="hf", max_shard_size=2 * MIB)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2


def test_names_of_nemos_configurations() -> None:
    from anyckpt.errors import UsageError
    from anyckpt.torch import Options

    class Strict:
        value = "raise_all"

    nemo1 = {
        "dist_ckpt_format": "torch_dist",
        "dist_ckpt_parallel_save": False,
        "dist_ckpt_parallel_load": True,
        "dist_ckpt_torch_dist_multiproc": 4,
        "dist_ckpt_assume_constant_structure": True,
        "dist_ckpt_load_strictness": None,
    }
    wanted = Options(
        format="megatron-core", parallel_save=False, parallel_load=True, workers=4, assume_constant_structure=True
    )
    assert Options.of(nemo1) == wanted
    nemo2 = {"save_ckpt_format": "zarr", "ckpt_load_strictness": Strict(), "ckpt_parallel_save_within_dp": True}
    assert Options.of(nemo2, data_parallel_group="group") == Options(
        format="megatron-core-zarr", strictness="raise_all", within="group"
    )
    assert Options.of({"ckpt_load_strictness": False, "cast": True}) == Options(strictness="log_all", cast=True)
    with pytest.raises(UsageError, match="needs the group"):
        Options.of(nemo2)
    with pytest.raises(UsageError, match="unknown option 'dist_ckpt_nothing'"):
        Options.of({"dist_ckpt_nothing": 1})
    with pytest.raises(UsageError, match="two names of format"):
        Options.of({"format": "hf", "save_ckpt_format": "torch_dist"})
    with pytest.raises(UsageError, match="not written so.*one of dcp.*found 'nemo'.*convert what was saved"):
        Options(format="nemo")
    with pytest.raises(UsageError, match="no such strictness"):
        Options(strictness="very")


def some_ranks(folder: str) -> Any:
    """Two of three ranks save and load by themselves; blocks of both are exchanged."""
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.dtypes import dtype
    from anyckpt.torch import saving
    from anyckpt.torch.collectives import Ranks
    from anyckpt.torch.live import LivePiece, LiveState
    from anyckpt.torch.options import Options

    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    own = dist.get_rank(group)
    whole = torch.arange(30.0).reshape(5, 6)
    piece = LivePiece("w", dtype("float32"), (5, 6), (0, 3 * own), whole[:, 3 * own : 3 * own + 3])
    path, ranks = os.path.join(folder, "w.safetensors"), Ranks(group, timeout=20)
    prepared = saving.prepare(lambda: LiveState([piece]), path, Options(format="safetensors"), ranks)
    saving.write(prepared, path, ranks)
    state = {"w": torch.zeros(5, 6)}
    report = anyckpt.torch.load(state, path, group=group, parallel_load=True)
    assert torch.equal(state["w"], whole)
    return report.bytes_read


def test_a_group_of_ranks_saves_and_loads_by_itself(tmp_path: Path) -> None:
    found = on_ranks(3, some_ranks, str(tmp_path))
    assert found[0] is None
    assert max(found[1], found[2]) - min(found[1], found[2]) == 30 * 4  # one has read what both have
