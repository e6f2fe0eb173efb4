"""What a rank has of a state: boxes of tensors as torch lays them out, objects, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer


def whole(shape: Sequence[int]) -> Any:
    import torch

    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.float32).reshape(tuple(shape))


def boxes_of(mesh_shape: tuple[int, ...], cases: list[tuple[tuple[int, ...], list[str]]]) -> list[Any]:
    """For each DTensor, this rank's boxes, each checked against the whole tensor."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from anyckpt.torch.describing import described

    mesh = init_device_mesh("cpu", mesh_shape)
    found = []
    for shape, spelled in cases:
        placements = [Replicate() if one == "R" else Shard(int(one)) for one in spelled]
        full = whole(shape)
        live = described({"w": distribute_tensor(full, mesh, placements)})
        for piece in live.pieces:
            inside = full
            for axis, (start, length) in enumerate(zip(piece.offset, piece.sizes, strict=True)):
                inside = inside.narrow(axis, start, length)
            assert torch.equal(inside, piece.tensor)
            assert piece.shape == shape
        found.append([(piece.offset, piece.sizes) for piece in live.pieces])
    return found


def test_dtensors_on_a_line() -> None:
    cases = [((7, 3), ["0"]), ((3, 5), ["1"]), ((1, 2), ["0"]), ((4,), ["R"])]
    first, second = on_ranks(2, boxes_of, (2,), cases)
    assert first == [[((0, 0), (4, 3))], [((0, 0), (3, 3))], [((0, 0), (1, 2))], [((0,), (4,))]]
    assert second == [[((4, 0), (3, 3))], [((0, 3), (3, 2))], [], [((0,), (4,))]]


def test_dtensors_on_a_plane() -> None:
    cases = [((5, 6), ["0", "1"]), ((5, 2), ["R", "0"]), ((7,), ["0", "0"])]
    found = on_ranks(4, boxes_of, (2, 2), cases)
    assert [one[0] for one in found] == [
        [((0, 0), (3, 3))],
        [((0, 3), (3, 3))],
        [((3, 0), (2, 3))],
        [((3, 3), (2, 3))],
    ]
    assert [one[1] for one in found] == [
        [((0, 0), (3, 2))],
        [((3, 0), (2, 2))],
        [((0, 0), (3, 2))],
        [((3, 0), (2, 2))],
    ]


def gathered() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from anyckpt.torch.describing import described

    sharded = distribute_tensor(whole((4, 2)), init_device_mesh("cpu", (2,)), [Shard(0)])
    live = described({"w": sharded.redistribute(placements=[Replicate()], async_op=True)})
    return [(piece.offset, piece.tensor.tolist()) for piece in live.pieces]


def test_a_tensor_that_is_being_gathered_is_waited_for() -> None:
    assert on_ranks(2, gathered) == [[((0, 0), whole((4, 2)).tolist())]] * 2


def strided(rows: int) -> list[Any]:
    """FSDP2 over tensor parallelism of the same axis: ``_StridedShard``."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from anyckpt.torch.describing import described

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(2, rows, bias=False))
    full = whole((rows, 2))
    with torch.no_grad():
        model[0].weight.copy_(full)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    pieces = described(model.state_dict()).pieces
    for piece in pieces:
        assert torch.equal(full[piece.offset[0] : piece.offset[0] + piece.sizes[0]], piece.tensor)
    return [(piece.offset[0], piece.sizes[0]) for piece in pieces]


def test_sharded_data_parallelism_over_tensor_parallelism() -> None:
    assert on_ranks(4, strided, 8) == [[(0, 2)], [(4, 2)], [(2, 2)], [(6, 2)]]


@pytest.mark.parametrize("rows", [5, 7, 10])
def test_shards_of_shards_that_are_uneven(rows: int) -> None:
    found = on_ranks(4, strided, rows)
    covered = [row for rank in found for start, length in rank for row in range(start, start + length)]
    assert sorted(covered) == list(range(rows))


def sharded_tensors() -> list[Any]:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    from anyckpt.torch.describing import described

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    live = described({"w": sharded_tensor.ones(spec, 5, 2)})
    return [(piece.shape, piece.offset, piece.sizes) for piece in live.pieces]


def test_sharded_tensors_of_the_first_generation() -> None:
    assert on_ranks(2, sharded_tensors) == [[((5, 2), (0, 0), (3, 2))], [((5, 2), (3, 0), (2, 2))]]


@given(
    lengths=st.integers(0, 40), dp=st.integers(1, 5), tp=st.integers(1, 5), order=st.sampled_from(["strided", "plain"])
)
def test_shards_of_an_axis_cover_it_once(lengths: int, dp: int, tp: int, order: str) -> None:
    from anyckpt.torch.tensor_kinds import shard_runs

    seen = []
    for first in range(dp):
        for second in range(tp):
            runs = shard_runs([(0, lengths)], dp, first, tp if order == "strided" else 1)
            runs = shard_runs(runs, tp, second)
            seen += [index for start, length in runs for index in range(start, start + length)]
    assert sorted(seen) == list(range(lengths))


def test_names_objects_and_the_way_back() -> None:
    import torch
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    from anyckpt.torch.describing import described

    state = {
        "model": {"w": torch.zeros(2, 3)},
        "optim": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "list": [torch.zeros(1), [1, 2]],
        "plain": [1, [2, 3]],
        "empty": {},
    }
    live = described(state)
    flat, paths = flatten_state_dict(state)
    names = {piece.name for piece in live.pieces} | {one.name for one in live.objects}
    assert names == {*flat, "empty"}
    assert {name: tuple(map(str, path)) for name, path in live.paths.items() if name != "empty"} == {
        name: tuple(map(str, path)) for name, path in paths.items()
    }
    for one in live.objects:
        if one.name == "optim.param_groups.0.lr":
            one.put(0.5)
    for piece in live.pieces:
        piece.tensor.fill_(3)
    assert state["optim"]["param_groups"][0]["lr"] == 0.5
    assert state["model"]["w"].tolist() == [[3.0] * 3] * 2
    assert state["optim"]["state"][0]["step"].item() == 3


def test_modules_and_optimizers_are_taken_by_their_state() -> None:
    import torch

    from anyckpt.torch.describing import described

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = described({"model": model, "optimizer": optimizer})
    assert {piece.name for piece in live.pieces} == {"model.weight", "model.bias"}
    next(one for one in live.objects if one.name == "optimizer.param_groups.0.lr").put(0.7)
    for finish in live.finish:
        finish()
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_what_has_no_elements_is_refused_by_name() -> None:
    import torch

    from anyckpt.errors import UsageError
    from anyckpt.torch.describing import described

    with pytest.raises(UsageError, match=r"'a\.w': is of the meta device"):
        described({"a": {"w": torch.empty(2, device="meta")}})
    with pytest.raises(UsageError, match=r"'a\.b': two parts of the state have one name"):
        described({"a": {"b": 1}, "a.b": 2})
    with pytest.raises(UsageError, match="there is no mapping of state"):
        described([1])  # type: ignore[arg-type]
