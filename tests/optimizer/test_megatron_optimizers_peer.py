"""Rank files of Megatron-Core's own optimizers are read, and what is written for other layouts is loaded by them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from anyckpt.errors import MappingError  # noqa: E402
from anyckpt.operations.convert import convert  # noqa: E402
from anyckpt.operations.reshard import reshard  # noqa: E402
from anyckpt.operations.steps.joining import open_checkpoint  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402

pytestmark = pytest.mark.peer

WORLD = 4
EXPERTS = {"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 8}


def case(tp: int = 1, pp: int = 1, ep: int = 1, vpp: int | None = None, **facts: Any) -> dict[str, Any]:
    world: dict[str, Any] = {
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep
    }  # fmt: skip
    if vpp:
        world["virtual_pipeline_model_parallel_size"] = vpp
    return {"world": world, "model": {}, "distributed": True, **facts}


SAVED = {
    "experts apart, distributed": case(2, ep=2, model=EXPERTS),
    "experts apart, distributed, many": case(1, ep=4, model=EXPERTS),
    "experts apart": case(2, ep=2, model=EXPERTS, distributed=False),
    "experts with the rest, distributed": case(2, model=EXPERTS),
    "experts with the rest": case(2, 2, model=EXPERTS, distributed=False),
    "buckets": case(2, overlap=True, bucket_size=700),
    "a bucket for each parameter": case(overlap=True, bucket_size=1),
    "tied over stages": case(1, 2, tied=True),
    "tied over stages, undistributed": case(2, 2, tied=True, distributed=False),
    "buckets of the tied first stage": case(1, 2, tied=True, overlap=True, bucket_size=900),
    "virtual pipeline": case(1, 2, vpp=2, model={"num_layers": 4}, overlap=True, bucket_size=500),
    "experts over stages": case(1, 2, 2, model=EXPERTS),
}
CUT = {
    "experts apart, distributed": [case(1, 2, 2), case(2, 1, 1), case(4, 1, 1)],
    "experts with the rest": [case(2, ep=2), case(1, 2, 2)],
    "buckets": [case(1, 2), case(4, 1)],
    "virtual pipeline": [case(2, 2, vpp=2), case(1, 1)],
    "tied over stages": [case(2, 1), case(2, 2)],
}


CORE = {
    "buckets": [case(2), case(1, 2), case(4, overlap=True, bucket_size=300)],
    "tied over stages, undistributed": [case(1, 2), case(2)],
    "experts apart": [case(2, ep=2), case(1, ep=4)],
    "experts with the rest": [case(2), case(1, 2)],
    "virtual pipeline": [case(1, 2, vpp=2), case(2, 2)],
}


def ran(cases: list[dict[str, Any]], folder: Path) -> None:
    """Every case on every rank, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.optimizer.megatron_optimizer_worker", str(WORLD)]
    done = subprocess.run(
        [*command, str(folder / "store"), str(folder / "cases.json")], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("saved")
    ran([{**one, "out": str(folder / name / "iter_0000005")} for name, one in SAVED.items()], folder / "run")
    yield folder


def check(path: Path) -> Any:
    """Each slot is the function of the weights that the worker put there."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    for name, tensor in checkpoint.tensors.items():
        values = tensor.numpy().astype(np.float32)
        expected = {"master": values + values / np.float32(1024), "exp_avg": values * 2 + np.float32(0.125)}
        expected["exp_avg_sq"] = values * values + np.float32(0.25)
        for slot, own in expected.items():
            np.testing.assert_array_equal(state.slots[slot][name].numpy(), own, err_msg=f"{slot} of {name}")
    assert state.slots["master"].keys() == checkpoint.tensors.keys()
    assert state.step == 5
    return state


@pytest.mark.parametrize("name", SAVED)
def test_every_parameter_is_found_where_megatron_put_it(name: str, saved: Path) -> None:
    check(saved / name / "iter_0000005")


def test_dense_state_of_other_expert_ranks_is_that_of_the_first(saved: Path, tmp_path: Path) -> None:
    """Megatron leaves None there; without the first rank's file nothing has it."""
    source = saved / "experts apart, distributed" / "iter_0000005"
    states = torch.load(source / "mp_rank_00_001" / "distrib_optim.pt", weights_only=False)
    assert states[0] is None and isinstance(states[1], dict)
    copy = tmp_path / "iter_0000005"
    for file in source.glob("*/*.pt"):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / file.parent.name / file.name).write_bytes(file.read_bytes())
    broken = copy / "mp_rank_00_000" / "distrib_optim.pt"
    first = torch.load(broken, weights_only=False)
    torch.save([None, first[1]], broken)
    checkpoint = open_checkpoint(copy)
    assert checkpoint.optimizer is not None
    with pytest.raises(MappingError, match=r"no rank's distrib_optim.pt has the state.*--optimizer drop"):
        checkpoint.optimizer()


def test_megatron_loads_what_is_cut_for_other_layouts(saved: Path, tmp_path: Path) -> None:
    loads = []
    for name, targets in CUT.items():
        for number, target in enumerate(targets):
            world = target["world"]
            out = tmp_path / f"{name} {number}"
            request = LayoutRequest(
                tensor_parallel=world["tensor_model_parallel_size"],
                pipeline_parallel=world["pipeline_model_parallel_size"],
                virtual_pipeline=world.get("virtual_pipeline_model_parallel_size", 1),
                expert_parallel=world["expert_model_parallel_size"],
            )
            reshard(saved / name / "iter_0000005", out, layout=request)
            check(out)
            same = {key: SAVED[name][key] for key in ("model", "tied") if key in SAVED[name]}
            loads.append({**target, **same, "distributed": False, "load": True, "out": str(out / "iter_0000005")})
    ran(loads, tmp_path / "run")


def test_megatron_loads_its_distributed_checkpoints_from_us(saved: Path, tmp_path: Path) -> None:
    """At any layout, with every key that is stored asked for, and none that is not."""
    loads = []
    for name, targets in CORE.items():
        for number, target in enumerate(targets):
            out = tmp_path / f"{name} {number}"
            request = LayoutRequest(expert_parallel=target["world"]["expert_model_parallel_size"])
            convert(saved / name / "iter_0000005", out, to="megatron-core", optimizer="keep", layout=request)
            same = {key: SAVED[name][key] for key in ("model", "tied") if key in SAVED[name]}
            loads.append({**target, **same, "core": str(out), "out": str(out)})
    for number, target in enumerate((case(2), case(1, 2))):
        out = tmp_path / f"nemo2 {number}"
        convert(saved / "buckets" / "iter_0000005", out, to="nemo2", optimizer="keep")
        loads.append({**target, "nemo2": str(out / "weights"), "out": str(out)})
    ran(loads, tmp_path / "run")
