"""Megatron-Core's distributed optimizer in a state: saved in each form, and loaded by what layout that permits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from tests.training.ranks import on_ranks

import anyckpt

pytestmark = pytest.mark.peer

MODULE = "tests.training.megatron_distributed"
FORMS = {
    "fully_reshardable": {},
    "dp_reshardable": {"dist_ckpt_optim_fully_reshardable": False},
    "dp_zero_gather_scatter": {"ckpt_parallel_save_optim": False},
}


def saved(path: str, settings: dict[str, Any], tensor_parallel: int) -> list[float]:
    from tests.training.megatron_distributed import DistributedTrained, without_gpu

    import anyckpt.torch

    without_gpu()
    trained = DistributedTrained(tensor_parallel=tensor_parallel)
    trained.train(2)
    anyckpt.torch.save(trained.state(), path, anyckpt.torch.Options.of({"save_ckpt_format": "torch_dist", **settings}))
    return trained.train(2)


def resumed(path: str, tensor_parallel: int, settings: dict[str, Any]) -> Any:
    from tests.training.megatron_distributed import DistributedTrained, without_gpu

    import anyckpt.torch
    from anyckpt.errors import MappingError

    without_gpu()
    trained = DistributedTrained(1, tensor_parallel=tensor_parallel)
    state = trained.state()
    try:
        anyckpt.torch.load(state, path, **settings)
    except MappingError as error:
        return str(error)
    trained.put(state)
    return trained.train(2)


def resumed_by_megatron(path: str, form: str) -> list[float]:
    import torch
    from megatron.core import dist_checkpointing
    from tests.training.megatron_distributed import DistributedTrained, without_gpu

    without_gpu()
    trained = DistributedTrained(1)
    common = dist_checkpointing.load_common_state_dict(path)
    assert common["content_metadata"]["distrib_optim_sharding_type"] == form
    state = trained.state()
    state["optimizer"] = trained.sharded.sharded_state_dict(
        {"model": state["model"]}, is_loading=True, metadata=common["content_metadata"]
    )
    state = dist_checkpointing.load(state, path)
    with torch.no_grad():
        trained.sharded.load_state_dict(state["optimizer"])
    trained.put({**state, "optimizer": trained.sharded})
    return trained.train(2)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_goes_on_as_if_it_had_never_stopped(form: str, tmp_path: Path) -> None:
    """Also as Megatron-Core loads it, with other data-parallel ranks, and at other layouts where the form permits."""
    path = str(tmp_path / "iter_0000002")
    wanted = on_ranks(2, saved, path, FORMS[form], 1, imported=[MODULE])
    assert on_ranks(2, resumed, path, 1, {}, imported=[MODULE]) == wanted
    found = anyckpt.open(path)
    buffers = [name for name in found if ".gbuf_idx_" in name]
    moments = [name for name in found if name.startswith("optimizer.state.exp_avg.")]
    assert (bool(moments), bool(buffers)) == (form == "fully_reshardable", form == "dp_reshardable")
    assert on_ranks(2, resumed_by_megatron, path, form, imported=[MODULE]) == wanted
    (alone,) = on_ranks(1, resumed, path, 1, {}, imported=[MODULE])
    assert alone == pytest.approx(wanted[0], rel=1e-5)
    for other in on_ranks(2, resumed, path, 2, {}, imported=[MODULE]):
        if form == "fully_reshardable":
            assert other == pytest.approx(wanted[0], rel=1e-4)
        else:
            assert f"as {form}" in other and "reshardable_optimizer=True" in other


def left_alone(path: str) -> None:
    from tests.training.megatron_distributed import DistributedTrained, without_gpu

    import anyckpt.torch

    without_gpu()
    trained = DistributedTrained()
    trained.train(1)
    before = trained.sharded.state_dict()
    anyckpt.torch.save(trained.state(), path, format="megatron-core", save_optimizer=False)
    state = trained.state()
    anyckpt.torch.load(state, path, load_optimizer=False)
    assert state["optimizer"] is trained.sharded and trained.sharded.state_dict() == before


def test_an_optimizer_is_left_out_or_left_alone(tmp_path: Path) -> None:
    on_ranks(1, left_alone, str(tmp_path / "c"), imported=[MODULE])
    assert not [name for name in anyckpt.open(tmp_path / "c") if "optimizer" in name]
