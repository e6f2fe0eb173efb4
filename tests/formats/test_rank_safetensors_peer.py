"""What torch's ``HuggingFaceStorageWriter`` writes for each rank of a mesh, and what it reads back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")

import anyckpt  # noqa: E402
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


@pytest.mark.parametrize("limit", [None, "100KB"])
def test_torch_reads_what_is_written_by_rank(limit: str | None, tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    source = fixture_path("families/llama/hf")
    anyckpt.convert(source, tmp_path / "model", to="hf", sharded=True, max_shard_size=limit)
    expected = anyckpt.open(source).state_dict("torch")
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "model")))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    (tmp_path / "consolidated").mkdir()
    consolidate_safetensors_files(
        input_dir=str(tmp_path / "model"), output_dir=str(tmp_path / "consolidated"),
        fqn_to_index_mapping=json.loads((tmp_path / "model/.hf_metadata/fqn_to_file_index_mapping.json").read_text()),
    )  # fmt: skip
    shutil.copy(source / "config.json", tmp_path / "consolidated")
    assert anyckpt.diff(tmp_path / "consolidated", source).equal
