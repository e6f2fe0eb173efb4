"""Sharded states in the words of Megatron-Core, of entities of ours, without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def whole(*shape: int, first: float = 0.0) -> Any:
    import math

    import torch

    return torch.arange(float(math.prod(shape))).reshape(shape) + first


def halves(key: str, data: Any, replica_id: Any, flattened_range: Any) -> list[Any]:
    """A gated projection as Megatron-Core stores it: this rank's half of each of two matrices."""
    from anyckpt.torch.megatron import ShardedTensor

    return [
        ShardedTensor.from_rank_offsets(key, part, (0, rank() + 2 * number, 4), replica_id=replica_id)
        for number, part in enumerate(data.chunk(2))
    ]


def state(factor: float) -> dict[str, Any]:
    """What one of two ranks has."""
    import torch

    from anyckpt.torch import megatron

    def columns(key: str, full: Any, **options: Any) -> Any:
        part = full.narrow(-1, rank() * 2, 2)
        return megatron.ShardedTensor.from_rank_offsets(key, part, (part.ndim - 1, rank(), 2), **options)

    flat = whole(3, 5).reshape(-1)[rank() * 7 : 7 + rank() * 8] * factor
    layer = whole(2, 3, first=100.0 * rank()) * factor
    fused = torch.cat([whole(8, 2)[rank() * 2 : rank() * 2 + 2], whole(8, 2)[4 + rank() * 2 : 6 + rank() * 2]])
    embedding = whole(3, 2)
    return {
        "model": {
            "layers": [megatron.ShardedTensor.from_rank_offsets("layers.w", layer, (0, rank(), 2), prepend_axis_num=1)],
            "columns": columns("columns", whole(3, 4) * factor),
            "copy": megatron.ShardedTensor.from_rank_offsets("copy", whole(4) * factor, replica_id=(0, rank())),
            "fused": megatron.ShardedTensorFactory("fused", fused * factor, halves, torch.cat),
            "embedding": megatron.ShardedTensor.from_rank_offsets(
                "embedding", embedding * factor, (0, rank(), 2), allow_shape_mismatch=True
            ),
        },
        "flat": megatron.ShardedTensor(
            "flat", flat, flat.dtype, (3, 5), (3, 5), (0, 0), flattened_range=slice(rank() * 7, 7 + rank() * 8)
        ),
        "rng": megatron.ShardedObject("rng", {"seed": rank()}, (1, 2), (0, rank())),
        "local": megatron.LocalNonpersistentObject(("only", rank())),
        "iteration": 5,
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
    }


def saved(path: str, format: str) -> list[str]:
    import anyckpt.torch

    return list(anyckpt.torch.save(state(1.0), path, format=format).ignored)


@pytest.mark.parametrize("format", ["megatron-core", "dcp"])
def test_entities_are_saved_as_what_they_are_parts_of(format: str, tmp_path: Path) -> None:
    import anyckpt

    assert on_ranks(2, saved, str(tmp_path / "x"), format) == [[], []]
    checkpoint = anyckpt.open(tmp_path / "x")
    expected = {
        "layers.w": [whole(2, 3).tolist(), whole(2, 3, first=100).tolist()],
        "columns": whole(3, 4).tolist(),
        "copy": whole(4).tolist(),
        "fused": whole(8, 2).tolist(),
        "embedding": [*whole(3, 2).tolist(), *whole(3, 2).tolist()],
        "flat": whole(3, 5).tolist(),
    }
    assert {name: tensor.numpy().tolist() for name, tensor in checkpoint.tensors.items()} == expected
    objects = dict(checkpoint.objects)
    assert {name: objects.pop(f"rng/shard_0.{name}_1.2") for name in (0, 1)} == {0: {"seed": 0}, 1: {"seed": 1}}
    assert objects == {
        "iteration": 5,
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
    }


def refusals(folder: str) -> list[str]:
    import torch

    import anyckpt.torch
    from anyckpt.errors import AnyckptError
    from anyckpt.torch.megatron import ShardedObject, ShardedTensor

    tensor = ShardedTensor.from_rank_offsets("w", torch.ones(2, 2), (0, rank(), 2))
    cases = [
        {"w": ShardedTensor.from_rank_offsets("w", torch.ones(2, 2), (0, 0, 2), replica_id=rank())},
        {"w": tensor, "o": ShardedObject("o", 1, (2, 2), (rank(), 0))},
        {"w": tensor, "args": {"rank": rank()}},
        {"w": tensor.without_data()},
        {"w": ShardedTensor("w", torch.ones(3), torch.float32, (2, 2), (4, 2), (0, 0))},
    ]
    told = []
    for case in cases:
        try:
            anyckpt.torch.save(case, f"{folder}/x")
        except AnyckptError as error:
            told.append(str(error))
    anyckpt.torch.save(cases[2], f"{folder}/x", check_objects=False)
    try:
        ShardedTensor.from_rank_offsets("w", torch.ones(2, 2), (2, 0, 2))
    except AnyckptError as error:
        told.append(str(error))
    return told


def test_what_is_no_whole_is_refused_by_name(tmp_path: Path) -> None:
    import anyckpt

    for holes, grid, common, nothing, shape, axis in on_ranks(2, refusals, str(tmp_path)):
        assert "'w'" in holes and "missing [2:4, 0:2]" in holes
        assert "'o'" in grid and "missing [0, 1], [1, 1]" in grid
        assert "'args'" in common and "differs between ranks" in common and "check_objects=False" in common
        assert "'w'" in nothing and "has no elements to save" in nothing
        assert "'w'" in shape and "expected (2, 2), found torch.Size([3])" in shape
        assert "there is no such part of the tensor" in axis
    assert anyckpt.open(tmp_path / "x").objects["args"] == {"rank": 0}
