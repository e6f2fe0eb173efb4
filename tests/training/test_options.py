"""Every option of saving and loading has the effect that it says."""

from __future__ import annotations

import os
import threading
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

    started = set()
    really = run.Run._work

    def work(self: Any, jobs: Any) -> None:
        started.add(threading.current_thread().name)
        really(self, jobs)

    state = {f"w{n}": torch.zeros(MIB // 4) for n in range(4)}  # a thread has a file at least
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run.Run, "_work", work)
        anyckpt.torch.save(state, path, workers=workers, max_shard_size=MIB, overwrite=True)
    return len(started)


def test_so_many_threads_write(tmp_path: Path) -> None:
    assert [threads_of(str(tmp_path / "c"), workers) for workers in (1, 3)] == [1, 3]


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
    assert Options.of({"dist_ckpt_parallel_dist_opt": False, "exchange_algo": "gather_rounds"}) == Options(
        parallel_optimizer=False, exchange="round-robin"
    )
    assert Options.of({"dist_ckpt_optim_fully_reshardable": False}) == Options(reshardable_optimizer=False)
    optimizer = {"ckpt_parallel_save_optim": True, "ckpt_save_optimizer": False, "ckpt_load_optimizer": False}
    assert Options.of({**optimizer, "ckpt_load_main_params": False, "exchange_algo": "gather_object"}) == Options(
        save_optimizer=False, load_optimizer=False, exchange="all-gather"
    )
    with pytest.raises(UsageError, match="ckpt_load_main_params.*copy its main parameters"):
        Options.of({"ckpt_load_main_params": True})
    with pytest.raises(UsageError, match="exchange so.*one of broadcast, all-gather, round-robin.*'gossip'"):
        Options(exchange="gossip")
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


def exchanged(path: str, exchange: str) -> Any:
    """What all ranks load alike, and what two of three do, in any order of memory; which collectives passed it on."""
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.torch import collectives, passing

    passing._ROUND_BYTES = 1 << 15
    rank, calls = dist.get_rank(), []

    def counting(name: str, call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return call(*arguments, **options)

        return counted

    for name in ("broadcast", "isend"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    collectives.Ranks.all_gather = counting("all_gather", collectives.Ranks.all_gather)  # type: ignore[method-assign]
    wanted: dict[str, Any] = {f"small{n}": torch.zeros(5, dtype=torch.bfloat16) for n in range(20)}
    wanted |= {"large": torch.zeros(3000), "turned": torch.zeros(7, 40).t(), "scalar": torch.zeros(())}
    wanted |= {"two": torch.zeros(11)} if rank else {}
    report = anyckpt.torch.load(wanted, path, parallel_load=True, exchange=exchange)
    stored = anyckpt.torch.load(path)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in wanted.items())
    return report.bytes_read, calls


def test_what_one_rank_read_is_exchanged_in_the_way_that_is_asked_for(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch

    state: dict[str, Any] = {f"small{n}": torch.full((5,), float(n + 1), dtype=torch.bfloat16) for n in range(20)}
    state |= {"large": torch.arange(3000.0), "turned": torch.arange(280.0).reshape(40, 7), "scalar": torch.tensor(4.0)}
    anyckpt.torch.save({**state, "two": torch.arange(11.0)}, tmp_path / "x.safetensors", format="safetensors")
    path = str(tmp_path / "x.safetensors")
    found = {way: on_ranks(3, exchanged, path, way) for way in anyckpt.torch.options.EXCHANGES}
    sizes = {way: sum(nbytes for nbytes, _ in ranks) for way, ranks in found.items()}
    assert len(set(sizes.values())) == 1  # each byte is read by one
    assert {name for _, calls in found["broadcast"] for name in calls} == {"broadcast", "isend"}
    for way in ("all-gather", "round-robin"):
        assert {name for _, calls in found[way] for name in calls} == {"all_gather"}
        assert len({len(calls) for _, calls in found[way]}) == 1
    rounds = {way: len(ranks[0][1]) for way, ranks in found.items()}
    assert rounds["all-gather"] < rounds["round-robin"]


def optimizer_saved(path: str, settings: dict[str, Any]) -> int:
    import torch

    import anyckpt.torch

    state = {
        "model": {f"w{n}": torch.ones(MIB // 4) for n in range(2)},
        "optimizer": {"state": {n: {"exp_avg": torch.ones(MIB // 4)} for n in range(2)}, "step": 3},
    }
    return anyckpt.torch.save(state, path, **settings).bytes_written


def test_copies_of_an_optimizers_state_are_shared_out_or_left_to_the_first(tmp_path: Path) -> None:
    shared = on_ranks(2, optimizer_saved, str(tmp_path / "shared"), {})
    assert all(2 * MIB < nbytes < 2.2 * MIB for nbytes in shared)
    first, second = on_ranks(2, optimizer_saved, str(tmp_path / "first"), {"parallel_optimizer": False})
    assert 2 * MIB <= first < 2.2 * MIB  # the optimizer's, so that the other writes the weights
    assert 2 * MIB <= second < 2.2 * MIB
    from anyckpt.engine.manifest import read_manifest

    manifest = read_manifest(str(tmp_path / "first"))
    assert manifest is not None
    assert {one.file for one in manifest.entries if "exp_avg" in one.name} == {"__0_0.distcp"}


def test_an_optimizers_state_is_left_out_or_left_alone(tmp_path: Path) -> None:
    import torch

    import anyckpt
    import anyckpt.torch

    def made() -> Any:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return {"model": model, "opt": optimizer, "optim": {"x": torch.ones(2), "n": 1}, "step": 4}

    first = made()
    anyckpt.torch.save(first, tmp_path / "all")
    anyckpt.torch.save(first, tmp_path / "weights", save_optimizer=False)
    assert set(anyckpt.open(tmp_path / "weights")) == {"model.weight", "model.bias"}
    assert set(anyckpt.torch.load(tmp_path / "weights")) == {"model", "step"}
    for path in ("all", "weights"):
        other = made()
        moments = other["opt"].state_dict()["state"][0]["exp_avg"].clone()
        other["optim"]["x"].fill_(7)
        other["step"] = 0
        report = anyckpt.torch.load(other, tmp_path / path, load_optimizer=False, strictness="raise_all")
        assert not report.missing and not report.unexpected
        assert torch.equal(other["model"].weight, first["model"].weight) and other["step"] == 4
        assert torch.equal(other["opt"].state_dict()["state"][0]["exp_avg"], moments)
        assert other["optim"]["x"].tolist() == [7, 7]


def test_tensors_go_to_the_device_that_is_asked_for(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch
    from anyckpt.torch.megatron import ShardedTensor
    from anyckpt.torch.megatron.state import memory_of

    anyckpt.torch.save({"w": torch.arange(6.0), "n": {"e": torch.empty(0, 2)}}, tmp_path / "x")
    mapped, own = anyckpt.torch.load(tmp_path / "x"), anyckpt.torch.load(tmp_path / "x", device="cpu", workers=1)
    assert torch.equal(mapped["w"], own["w"]) and own["n"]["e"].shape == (0, 2)
    file = next((tmp_path / "x").glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    assert own["w"].tolist() == [0, 1, 2, 3, 4, 5]  # not the file's pages
    entity = ShardedTensor("w", None, torch.float32, (6,), (6,), (0,), (1,))
    assert memory_of(entity, "meta").device.type == "meta"  # where there is an accelerator, its memory
    assert anyckpt.torch.Options.of({"dist_ckpt_load_on_device": False}).device is None
    expected = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
    assert anyckpt.torch.Options.of({"ckpt_load_directly_on_device": True}).device == expected
