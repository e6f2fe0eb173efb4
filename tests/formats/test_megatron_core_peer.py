"""Megatron-Core loads what we write: into a real GPT model at other parallel sizes, and by its own tools."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from tests.support import expected_of, fixture_path, write_plan  # noqa: E402

from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.containers.dcp import dcp_files  # noqa: E402
from anyckpt.engine.plan import Plan  # noqa: E402
from anyckpt.formats import megatron_core  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.megatron_core.writer import torch_dist_files  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.tensor import LazyTensor, from_array  # noqa: E402

pytestmark = pytest.mark.peer

WORKER = Path(__file__).parent / "megatron_core_worker.py"
SOURCE = "mcore/gpt_dense_tp2pp2"


def bytes_of(tensor: Any) -> bytes:
    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def load_in_megatron(checkpoint: Path, folder: Path, world: int, *modes: str) -> list[dict[str, Any]]:
    """What each rank's model holds after loading with each strictness."""
    outs = [folder / f"rank{rank}.pt" for rank in range(world)]
    fixed = [str(world), str(folder / "store"), str(checkpoint)]
    ranks = []
    for rank, out in enumerate(outs):
        command = [sys.executable, str(WORKER), str(rank), *fixed, str(out), *modes]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(out) for out in outs]


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return megatron_core.FORMAT.read(look_at(fixture_path(f"{SOURCE}/ckpt")))


def written(source: Checkpoint, folder: Path) -> Path:
    assert megatron_core.FORMAT.plan is not None
    return write_plan(megatron_core.FORMAT.plan(source, WriteOptions(ranks=3)), folder)


def as_global(name: str, parameter: Any, tensors: dict[str, LazyTensor]) -> bytes:
    """The stored bytes of one of the model's parameters."""
    parts = name.split(".")
    layer = int(parts.pop(2)) if parts[:2] == ["decoder", "layers"] else None
    key = ".".join(parts)
    key = key.replace("layers.input_layernorm.weight", "layers.self_attention.linear_qkv.layer_norm_weight")
    key = key.replace("layers.pre_mlp_layernorm.weight", "layers.mlp.linear_fc1.layer_norm_weight")
    tensor = tensors[key] if layer is None else tensors[key][layer]
    assert tensor.shape == tuple(parameter.shape), name
    return tensor.numpy().tobytes()


def test_a_real_model_loads_it(source: Checkpoint, tmp_path: Path) -> None:
    """With the default strictness, and when told to refuse what the checkpoint or the model lacks."""
    checkpoint = written(source, tmp_path / "c")
    (results,) = load_in_megatron(
        checkpoint, tmp_path, 1, "assume_ok_unexpected", "raise_unexpected", "return_all", "raise_all"
    )
    for mode in ("assume_ok_unexpected", "raise_unexpected", "return_all"):
        parameters = results[mode]["parameters"]
        assert len(parameters) == 15
        for name, parameter in parameters.items():
            assert bytes_of(parameter) == as_global(name, parameter, source.tensors), name
        assert results[mode]["common"]["iteration"] == "10"
        assert "num_layers=2" in results[mode]["common"]["args"]
    assert results["return_all"]["unexpected"] == []
    assert results["return_all"]["missing"] == ["rng_state"]
    assert "Missing keys (for all ranks): {'rng_state'}" in results["raise_all"]  # which a model alone does not have
    plain = {name: value for name, value in results["plain"].items() if isinstance(value, torch.Tensor)}
    expected = expected_of(SOURCE)["tensors"]
    assert {name: hashlib.sha256(bytes_of(tensor)).hexdigest() for name, tensor in plain.items()} == {
        name: facts["sha256"] for name, facts in expected.items()
    }


def test_a_real_model_loads_it_at_another_parallel_size(source: Checkpoint, tmp_path: Path) -> None:
    """Written as from three ranks, loaded on two with tensor parallelism: equal to what the real writer's gives."""
    ours = load_in_megatron(written(source, tmp_path / "c"), tmp_path, 2, "raise_unexpected")
    shards = [rank["raise_unexpected"]["parameters"] for rank in ours]
    axes = {"linear_proj": 1, "linear_fc2": 1, "linear_qkv": 0, "word_embeddings": 0, "output_layer": 0}
    for name in shards[0]:
        halves = [rank[name] for rank in shards]
        axis = next((axis for part, axis in axes.items() if part in name), None)
        if "linear_fc1" in name:  # each rank holds its part of the gate and its part of the up projection
            gates, ups = zip(*(half.chunk(2) for half in halves), strict=True)
            whole = torch.cat([*gates, *ups])
        else:
            whole = halves[0] if axis is None else torch.cat(halves, dim=axis)
        assert bytes_of(whole) == as_global(name, whole, source.tensors), name


def test_without_extra_states_no_model_loads(source: Checkpoint, tmp_path: Path) -> None:
    """Why ``_extra_state`` objects are written though they are empty."""
    files = torch_dist_files(source.tensors, {}, {"iteration": 1})
    bare = [file for file in files if not file.path.endswith((".distcp", ".metadata"))]
    bare += dcp_files(source.tensors, {}, megatron=True)
    (results,) = load_in_megatron(
        write_plan(Plan("x", tuple(bare)), tmp_path / "c"), tmp_path, 1, "assume_ok_unexpected"
    )
    assert "Missing key in checkpoint state_dict" in results["assume_ok_unexpected"]
    assert "_extra_state/shard_0_2" in results["assume_ok_unexpected"]


def test_megatron_core_lists_and_loads_it(tmp_path: Path) -> None:
    """Strict loads of every kind of item by the library itself, on one rank."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_content_metadata, load_sharded_metadata

    array = np.arange(2 * 6 * 4, dtype=np.float32).reshape(2, 6, 4)
    tensors = {"stacked.layers.weight": from_array(array), "scalar": from_array(np.array(4.0))}
    objects = {"rng_state/shard_0.1_1.2": {"seed": 5}, "rng_state/shard_0.0_1.2": [1, None]}
    common = {"iteration": 9, "content_metadata": {"singleton_local_shards": False}}
    checkpoint = write_plan(Plan("x", tuple(torch_dist_files(tensors, objects, common))), tmp_path / "c")

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint))
        listed = load_sharded_metadata(str(checkpoint))
        assert set(listed) == {*tensors, *objects}
        assert listed["stacked.layers.weight"].global_shape == (2, 6, 4)
        assert load_content_metadata(str(checkpoint)) == common["content_metadata"]

        def part(layer: int, column: int) -> Any:
            return ShardedTensor.from_rank_offsets(
                "stacked.layers.weight", torch.empty(6, 2), (0, layer, 2), (2, column, 2), prepend_axis_num=1
            )

        parts = {f"{layer}.{column}": part(layer, column) for layer in range(2) for column in range(2)}
        wanted = {
            **parts,
            "scalar": ShardedTensor.from_rank_offsets("scalar", torch.empty((), dtype=torch.float64)),
            "a": ShardedObject("rng_state", None, (1, 2), (0, 0)),
            "b": ShardedObject("rng_state", None, (1, 2), (0, 1)),
        }
        loaded = dist_checkpointing.load(wanted, str(checkpoint), strict="raise_all")
    finally:
        torch.distributed.destroy_process_group()
    for layer in range(2):
        for column in range(2):
            expected = array[layer, :, 2 * column : 2 * column + 2]
            assert loaded[f"{layer}.{column}"].tolist() == expected.tolist()
    assert loaded["scalar"].item() == 4.0 and loaded["iteration"] == 9
    assert (loaded["a"], loaded["b"]) == ([1, None], {"seed": 5})
