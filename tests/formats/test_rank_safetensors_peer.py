"""What torch's ``HuggingFaceStorageWriter`` writes for each rank of a mesh, and what it reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from anyckpt.formats import registry  # noqa: E402

pytestmark = pytest.mark.peer


def test_what_torch_writes_by_rank_is_joined(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = {
        "embed.weight": torch.randn(7, 4),
        "norm.weight": torch.randn(5),
        "up.weight": torch.randn(6, 8).bfloat16(),
    }
    placements = {"embed.weight": [Shard(0), Replicate()], "norm.weight": [Shard(0), Replicate()]}
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2))
            state = {
                name: distribute_tensor(tensor, mesh, placements.get(name, [Shard(0), Shard(1)]), src_data_rank=None)
                for name, tensor in whole.items()
                if rank % 2 == 0 or name not in placements  # the planner leaves out what another rank writes
            }
            planner = DefaultSavePlanner()
            planner.set_up_planner(state, is_coordinator=False)
            plans = [planner.create_local_plan()] * 4
            writer.write_data(writer.prepare_global_plan(plans)[rank], planner).wait()
        finally:
            dist.destroy_process_group()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7}))
    assert len(list(tmp_path.glob("shard-*"))) == 4
    joined = registry.read(tmp_path).tensors
    assert set(joined) == set(whole)
    for name, tensor in joined.items():
        assert tensor.shape == tuple(whole[name].shape)
        assert tensor.numpy().tobytes() == whole[name].view(torch.uint8).numpy().tobytes(), name
