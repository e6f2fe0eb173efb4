"""Distributed checkpoints and torch: it loads what we write, and we read what it writes."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as torch_dcp  # noqa: E402
from tests.support import expected_of, fixture_path, write_plan  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

from anyckpt.containers.dcp import dcp_files, read_dcp  # noqa: E402
from anyckpt.dtypes import BY_NAME  # noqa: E402
from anyckpt.engine.plan import Plan  # noqa: E402
from anyckpt.formats import dcp  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.storage.folder import LocalFolder  # noqa: E402
from anyckpt.tensor import LazyTensor, Stored, from_array  # noqa: E402

pytestmark = pytest.mark.peer

_DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "complex64"),
]


def sample() -> dict[str, LazyTensor]:
    """A tensor of every type that torch can copy, odd shapes, and one large enough to be aligned to pages."""
    generator = np.random.default_rng(0)
    tensors: dict[str, LazyTensor] = {}
    for name in _DTYPES:
        kind = BY_NAME[name]
        raw = from_array(generator.integers(0, 2, 5 * 4 * kind.itemsize, dtype=np.uint8))
        tensors[f"types.{name}"] = Stored(raw.source, 0, kind, (5, 4))
    tensors["scalar"] = from_array(np.array(2.5, dtype=np.float32))
    tensors["empty"] = from_array(np.zeros((0, 3), dtype=np.float32))
    tensors["decoder.layers.big"] = from_array(generator.standard_normal((3, 300, 400)).astype(np.float64))
    return tensors


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def our_digest(tensor: LazyTensor) -> str:
    return hashlib.sha256(b"".join(chunk.tobytes() for chunk in tensor.chunks())).hexdigest()


@pytest.mark.parametrize("megatron", [False, True])
def test_torch_loads_what_is_written(tmp_path: Path, megatron: bool) -> None:
    tensors = sample()
    files = dcp_files(tensors, {}, ranks=2, megatron=megatron, chunk_bytes=2_000_000)
    write_plan(Plan("dcp", tuple(files)), tmp_path / "c")
    target = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype.name)) for name, t in tensors.items()}
    torch_dcp.load(target, checkpoint_id=tmp_path / "c", no_dist=True)
    assert {name: digest(t) for name, t in target.items()} == {name: our_digest(t) for name, t in tensors.items()}


def test_torch_restores_the_nesting(tmp_path: Path) -> None:
    source = dcp.FORMAT.read(look_at(fixture_path("mcore/dcp_fsdp_w2/ckpt")))
    assert dcp.FORMAT.plan is not None
    write_plan(dcp.FORMAT.plan(source, WriteOptions(ranks=2)), tmp_path / "c")
    dcp_to_torch_save(tmp_path / "c", tmp_path / "ours.pt")
    dcp_to_torch_save(fixture_path("mcore/dcp_fsdp_w2/ckpt"), tmp_path / "theirs.pt")
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("ours.pt", "theirs.pt"))
    assert pformat(ours) == pformat(theirs)
    expected = expected_of("mcore/dcp_fsdp_w2")["tensors"]
    assert digest(ours["model"]["layers.0.weight"]) == expected["model.layers.0.weight"]["sha256"]
    assert ours["optim"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_objects_load(tmp_path: Path) -> None:
    objects = {"epoch": 3, "name": "é", "nested": {"a": [1, (2.5, None)], "t": from_array(np.arange(3))}}
    write_plan(Plan("dcp", tuple(dcp_files({}, objects))), tmp_path / "c")
    dcp_to_torch_save(tmp_path / "c", tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded["nested"]["t"].tolist() == [0, 1, 2]
    assert (loaded["epoch"], loaded["name"], loaded["nested"]["a"]) == (3, "é", [1, (2.5, None)])


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    state: dict[str, Any] = {
        "transposed": base.reshape(4, 6).t(),
        "slice": base[3:7],
        "expanded": base[:1].expand(5),
        "nested": {"list": [torch.ones(2), {"x": 5}], "dotted.key": torch.zeros(3)},
        "big": torch.randn(700, 700),
        "set": {1, 2},
    }
    torch_dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    contents = read_dcp(LocalFolder(tmp_path / "c"))
    for name, tensor in [
        ("transposed", state["transposed"]),
        ("slice", state["slice"]),
        ("expanded", state["expanded"]),
    ]:
        assert contents.tensors[name].numpy().tolist() == tensor.tolist()
    assert our_digest(contents.tensors["big"]) == digest(state["big"])
    assert contents.paths is not None and contents.paths["nested.dotted.key"] == ("nested", "dotted.key")
    assert contents.paths["nested.list.1.x"] == ("nested", "list", 1, "x") and contents.objects["nested.list.1.x"] == 5
    assert contents.objects["set"] == {1, 2}


def _load_sharded(rank: int, store: str, checkpoint: str, results: Any) -> None:
    """Load rows and columns of tensors on one of two ranks, as FSDP2 and tensor parallelism do."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, zeros

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, DTensor] = {
        "rows": zeros((7, 6), dtype=torch.float32, device_mesh=mesh, placements=[Shard(0)]),
        "columns": zeros((7, 6), dtype=torch.float32, device_mesh=mesh, placements=[Shard(1)]),
    }
    torch_dcp.load(state, checkpoint_id=checkpoint)
    results.put((rank, {name: tensor.to_local().tolist() for name, tensor in state.items()}))
    dist.destroy_process_group()


def test_two_ranks_load_other_shards_than_were_written(tmp_path: Path) -> None:
    array = np.arange(42, dtype=np.float32).reshape(7, 6)
    tensors = {"rows": from_array(array), "columns": from_array(array)}
    files = dcp_files(tensors, {}, ranks=3, chunk_bytes=60)
    write_plan(Plan("dcp", tuple(files)), tmp_path / "c")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "store"), str(tmp_path / "c"), results)
    ranks = [context.Process(target=_load_sharded, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    loaded = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    assert loaded[0]["rows"] + loaded[1]["rows"] == array.tolist()
    assert np.hstack([loaded[rank]["columns"] for rank in range(2)]).tolist() == array.tolist()


def _save_alone(rank: int, store: str, checkpoint: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = torch.arange(21, dtype=torch.float32).reshape(7, 3)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    torch_dcp.save({"w": sharded, "norm": torch.ones(3), "epoch": 4}, checkpoint_id=checkpoint, use_collectives=False)
    dist.destroy_process_group()


def test_an_index_per_rank_is_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "store"), str(tmp_path / "c"))
    ranks = [context.Process(target=_save_alone, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if "metadata" in path.name) == [
        "__0.metadata",
        "__1.metadata",
    ]
    contents = read_dcp(LocalFolder(tmp_path / "c"))
    assert contents.tensors["w"].numpy().tolist() == np.arange(21, dtype=np.float32).reshape(7, 3).tolist()
    assert contents.tensors["norm"].numpy().tolist() == [1, 1, 1] and contents.objects["epoch"] == 4
