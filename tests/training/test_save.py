"""Live state of several ranks saved as one checkpoint, which torch's own loader takes."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer


def sharded_state(world: int, seed: int = 0) -> dict[str, Any]:
    """A nested state of DTensors, cut unevenly by rows and by columns, plain tensors and objects."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(seed)

    def full(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    def spread(tensor: Any, placement: Any) -> Any:
        return distribute_tensor(tensor, mesh, [placement])

    return {
        "model": {
            "rows": spread(full(7, 5), Shard(0)),
            "columns": spread(full(4, 6).bfloat16(), Shard(1)),
            "copies": spread(full(3, 3), Replicate()),
            "plain": full(2, 2),
            "scalar": full(),
            "empty": full(0, 4),
        },
        "optimizer": {
            "state": {"rows": {"exp_avg": spread(full(7, 5), Shard(0)), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["rows"]}],
        },
        "step": 3,
    }


def plain(value: Any) -> Any:
    """The same with whole tensors."""
    import torch

    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if hasattr(value, "full_tensor"):
        return value.full_tensor().clone()
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    import torch

    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key, inner in wanted.items():
            assert_same(found[key], inner, f"{where}.{key}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def saved(path: str, settings: dict[str, Any]) -> Any:
    """Save, and load the same with torch's own into another state of the same layout."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    world = dist.get_world_size()
    state = sharded_state(world)
    report = anyckpt.torch.save(state, path, **settings)
    other = sharded_state(world, seed=1)
    other["step"] = 0
    other["optimizer"]["param_groups"][0]["lr"] = 0.0
    dcp.load(other, checkpoint_id=path)
    assert_same(plain(other), plain(state))
    return report


def test_what_is_saved_loads_with_torch(tmp_path: Any) -> None:
    first, second = on_ranks(2, saved, str(tmp_path / "checkpoint"), {})
    assert first.bytes_total == second.bytes_total
    names = {name for name in os.listdir(tmp_path / "checkpoint") if name.endswith(".distcp")}
    assert names == {"__0_0.distcp", "__1_0.distcp"}
    assert os.listdir(tmp_path) == ["checkpoint"]


def saved_as(path: str, settings: dict[str, Any]) -> Any:
    import torch.distributed as dist

    import anyckpt.torch

    state = sharded_state(dist.get_world_size())
    report = anyckpt.torch.save(state, path, **settings)
    return plain(state), report


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def test_whole_tensors_are_written_by_all_ranks(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    (state, report), _ = on_ranks(2, saved_as, str(tmp_path / "model.safetensors"), {"format": "safetensors"})
    assert_same(load_file(tmp_path / "model.safetensors"), state["model"])
    assert report.ignored["optimizer.state.rows.exp_avg"].startswith("training state")
    (state, _), _ = on_ranks(2, saved_as, str(tmp_path / "hf"), {"format": "hf", "config": {"model_type": "gpt2"}})
    assert_same(load_file(tmp_path / "hf/model.safetensors"), state["model"])
    assert (tmp_path / "hf/config.json").read_text().startswith('{\n  "model_type": "gpt2"')


def test_one_file_of_torch_is_written_by_all_ranks(tmp_path: Any) -> None:
    import torch

    (state, first), (_, second) = on_ranks(2, saved_as, str(tmp_path / "state.pt"), {"format": "torch"})
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), state)
    assert first.bytes_total == (tmp_path / "state.pt").stat().st_size
    assert min(first.bytes_written, second.bytes_written) > 0


def large_rows_and_columns(path: str) -> Any:
    """Tensors of several blocks, whose rows and columns several ranks have."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import anyckpt.torch

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(1500, 1601, generator=generator)
    state = {"rows": distribute_tensor(full, mesh, [Shard(0)]), "columns": distribute_tensor(full, mesh, [Shard(1)])}
    report = anyckpt.torch.save(state, path, format="safetensors")
    return full if dist.get_rank() == 0 else None, report.bytes_written


@pytest.mark.parametrize("world", [2, 3])
def test_blocks_of_several_ranks_are_brought_to_one(tmp_path: Any, world: int) -> None:
    from safetensors.torch import load_file

    found = on_ranks(world, large_rows_and_columns, str(tmp_path / "m.safetensors"))
    assert_same(load_file(tmp_path / "m.safetensors"), {"rows": found[0][0], "columns": found[0][0]})
    written = [one[1] for one in found]
    assert max(written) - min(written) <= 12 << 20


def saved_for_megatron(path: str) -> Any:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    import anyckpt.torch

    rank, world = dist.get_rank(), dist.get_world_size()
    state = sharded_state(world)
    anyckpt.torch.save(state, path, format="megatron-core")
    common = dist_checkpointing.load_common_state_dict(path)
    wanted = plain(state)
    rows = wanted["model"]["rows"][:6]
    import torch

    part = ShardedTensor("model.rows", torch.zeros(7, 5), torch.float32, (7, 5), (7, 5), (0, 0), (1, 1), rank)
    loaded = dist_checkpointing.load({"rows": part}, path)
    assert torch.equal(loaded["rows"][:6], rows)
    return common


def test_megatron_core_loads_what_is_saved_for_it(tmp_path: Any) -> None:
    common, _ = on_ranks(2, saved_for_megatron, str(tmp_path / "m"), imported=("megatron.core.dist_checkpointing",))
    assert common["step"] == 3
    assert common["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["rows"]}]


def test_zarr_arrays_have_the_ranks_shards_as_chunks(tmp_path: Any) -> None:
    import anyckpt

    path = str(tmp_path / "z")
    (state, _), _ = on_ranks(2, saved_as, path, {"format": "megatron-core-zarr"})
    checkpoint = anyckpt.open(path)
    assert os.path.exists(os.path.join(path, "model.rows", "1.0"))
    for name, tensor in flat(state).items():
        if hasattr(tensor, "dtype"):
            assert_same(checkpoint[name].torch(), tensor, name)
