"""Rank files of meshes of any shape, as torch's own placements cut tensors for them.

One process stands for each rank in turn: ``distribute_tensor`` without a source rank cuts and sends nothing.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyckpt.formats import registry  # noqa: E402

pytestmark = pytest.mark.peer

MESHES = [(3,), (4,), (2, 2), (2, 3), (2, 1, 2)]


def save_ranks(folder: Path, whole: dict[str, Any], mesh: tuple[int, ...], placements: dict[str, Any]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = torch.Size(mesh).numel()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            ranks = init_device_mesh("cpu", mesh, mesh_dim_names=tuple("abc"[: len(mesh)]))
            state = {n: distribute_tensor(t, ranks, placements[n], src_data_rank=None) for n, t in whole.items()}
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_torch_cuts_is_joined(mesh: tuple[int, ...], tmp_path: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard

    chosen = random.Random(str(mesh))
    whole, placements = {}, {}
    for number in range(30):
        shape = tuple(chosen.choice((0, 1, 2, 3, 5, 7, 8, 12)) for _ in range(chosen.choice((1, 2, 3))))
        kinds = [Replicate(), *map(Shard, range(len(shape)))]
        whole[f"w{number}"] = torch.randn(shape).to(chosen.choice((torch.float32, torch.bfloat16)))
        placements[f"w{number}"] = [chosen.choice(kinds) for _ in mesh]
    save_ranks(tmp_path, whole, mesh, placements)
    joined = registry.read(tmp_path)
    assert list(joined.tensors) == list(whole)
    for name, tensor in joined.tensors.items():
        assert tensor.shape == tuple(whole[name].shape), (name, placements[name])
        assert tensor.numpy().tobytes() == whole[name].contiguous().view(torch.uint8).numpy().tobytes(), placements[
            name
        ]
