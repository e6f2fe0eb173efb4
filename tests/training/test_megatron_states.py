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
        "rng": megatron.ShardedObject("rng_state", {"seed": rank()}, (1, 1, 2), (0, 0, rank())),
        "local": megatron.LocalNonpersistentObject(("only", rank())),
        "iteration": 5,
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
        "numbered": {0: "zero", 1: "one"},
    }


def saved(path: str, format: str) -> list[str]:
    import anyckpt.torch

    return list(anyckpt.torch.save(state(1.0), path, format=format).ignored)


@pytest.mark.parametrize("format", ["megatron-core", "megatron-core-zarr", "dcp"])
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
    assert {name: objects.pop(f"rng_state/shard_0.0.{name}_1.1.2") for name in (0, 1)} == {
        0: {"seed": 0},
        1: {"seed": 1},
    }
    assert objects == {
        "iteration": 5,
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
        "numbered": {0: "zero", 1: "one"},
    }


def plain(value: Any) -> Any:
    """With lists for tensors."""
    import torch

    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def loaded(path: str, settings: dict[str, Any]) -> Any:
    import anyckpt.torch

    found = state(0.0)
    found["flat"].data, found["iteration"], found["groups"] = None, 0, "whatever"
    report = anyckpt.torch.load(found, path, **settings)
    return plain(found), report.unexpected, report.missing


@pytest.mark.parametrize(
    ("format", "parallel"),
    [("megatron-core", False), ("megatron-core", True), ("megatron-core-zarr", False), ("dcp", False)],
)
def test_entities_are_loaded_as_what_they_are_parts_of(format: str, parallel: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    on_ranks(2, saved, path, format)
    settings = {"parallel_load": parallel, "strictness": "raise_all"}
    for number, (found, unexpected, missing) in enumerate(on_ranks(2, loaded, path, settings)):
        flat = whole(3, 5).reshape(-1).tolist()
        rows = whole(8, 2).tolist()
        assert found == {
            "model": {
                "layers": [whole(2, 3, first=100.0 * number).tolist()],
                "columns": [row[number * 2 : number * 2 + 2] for row in whole(3, 4).tolist()],
                "copy": whole(4).tolist(),
                "fused": [*rows[number * 2 : number * 2 + 2], *rows[4 + number * 2 : 6 + number * 2]],
                "embedding": whole(3, 2).tolist(),
            },
            "flat": flat[number * 7 : 7 + number * 8],
            "rng": {"seed": number},
            "local": ("only", number),
            "iteration": 5,
            "groups": [{"lr": 0.1}, {"lr": 0.2}],
            "numbered": {0: "zero", 1: "one"},
        }
        assert (unexpected, missing) == ((), ())


def elsewhere(path: str) -> Any:
    """One rank, another vocabulary, another type, other bounds of what was flattened."""
    import torch

    import anyckpt.torch
    from anyckpt.torch.megatron import ShardedTensor

    def tensor(key: str, *shape: int, **options: Any) -> Any:
        return ShardedTensor.from_rank_offsets(key, torch.full(shape, 9.0), **options)

    found = {
        "longer": tensor("embedding", 8, 2, allow_shape_mismatch=True),
        "shorter": tensor("embedding", 4, 2, allow_shape_mismatch=True),
        "half": ShardedTensor.from_rank_offsets("columns", torch.zeros(3, 4, dtype=torch.float64)),
        "layers": tensor("layers.w", 2, 2, 3),
        "part": ShardedTensor("flat", None, torch.float32, (3, 3), (3, 5), (0, 2), None, flattened_range=slice(2, 8)),
    }
    anyckpt.torch.load(found, path, cast=True)
    return {name: plain(value) for name, value in found.items()}


def test_other_layouts_vocabularies_and_types(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    on_ranks(2, saved, path, "megatron-core")
    (found,) = on_ranks(1, elsewhere, path)
    rows = [*whole(3, 2).tolist(), *whole(3, 2).tolist()]
    assert found["longer"] == [*rows, [0.0, 0.0], [0.0, 0.0]]
    assert found["shorter"] == rows[:4]
    assert found["half"] == whole(3, 4).tolist()
    assert found["layers"] == [whole(2, 3).tolist(), whole(2, 3, first=100).tolist()]
    assert found["part"] == [4.0, 7.0, 8.0, 9.0, 12.0, 13.0]
    assert (found["iteration"], found["groups"]) == (5, [{"lr": 0.1}, {"lr": 0.2}])


def strictly(path: str, mode: str) -> Any:
    """Asks for a tensor and an object that the checkpoint lacks, and not for most that it has."""
    import io
    import logging

    import torch

    import anyckpt.torch
    from anyckpt.errors import MappingError
    from anyckpt.torch.megatron import ShardedObject, ShardedTensor

    stream = io.StringIO()
    logging.getLogger("anyckpt.torch").addHandler(logging.StreamHandler(stream))
    found = {
        "copy": ShardedTensor.from_rank_offsets("copy", torch.zeros(4)),
        "new": ShardedTensor.from_rank_offsets("new", torch.full((1,), 7.0)),
        "object": ShardedObject("new object", "old", (1,), (0,)),
    }
    try:
        report = anyckpt.torch.load(found, path, strictness=mode)
    except MappingError as error:
        return "raised", str(error)
    return plain(found), report.unexpected, report.missing, stream.getvalue()


def test_each_strictness_does_what_megatron_core_says(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    on_ranks(2, saved, path, "megatron-core")
    lacking = ("new", "new object/shard_0_1")
    for mode in ("assume_ok_unexpected", "raise_unexpected", "raise_all"):
        ((what, told),) = on_ranks(1, strictly, path, mode)
        assert what == "raised" and all(name in told for name in lacking)
    for mode in ("log_unexpected", "log_all", "return_unexpected", "return_all", "ignore_all"):
        ((found, unexpected, missing, logged),) = on_ranks(1, strictly, path, mode)
        assert {name: found[name] for name in ("copy", "iteration")} == {"copy": whole(4).tolist(), "iteration": 5}
        assert "new" not in found and "object" not in found
        assert unexpected == lacking
        assert {"columns", "flat", "rng_state/shard_0.0.0_1.1.2"} < set(missing)
        assert ("new object" in logged) == mode.startswith("log")
        assert ("columns" in logged) == (mode == "log_all")


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


def saved_in_the_background(folder: str) -> Any:
    import anyckpt.torch

    with anyckpt.torch.Saver(folder, format="megatron-core", assume_constant_structure=True) as saver:
        for step in range(4):
            now = state(1.0 + step)
            now["iteration"] = step
            saver.save(now, step)
    found = []
    for step in range(4):
        other = state(0.0)
        anyckpt.torch.load(other, f"{folder}/step-{step}")
        found.append((plain(other["model"]["copy"]), plain(other["flat"]), other["iteration"]))
    return found


def test_a_saver_takes_them(tmp_path: Path) -> None:
    for number, found in enumerate(on_ranks(2, saved_in_the_background, str(tmp_path))):
        flat = whole(3, 5).reshape(-1)[number * 7 : 7 + number * 8]
        assert found == [((whole(4) * (1 + k)).tolist(), (flat * (1 + k)).tolist(), k) for k in range(4)]


def quantized(path: str) -> Any:
    """A tensor of another kind that stands for numbers, as Transformer Engine's FP8, and a DTensor."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import anyckpt.torch
    from anyckpt.torch.megatron import ShardedTensor

    class Codes(torch.Tensor):
        """Numbers that are kept as their halves."""

        @staticmethod
        def __new__(cls, halves: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, halves.shape, dtype=torch.float32)

        def __init__(self, halves: Any) -> None:
            self.halves = halves

        @classmethod
        def __torch_dispatch__(cls, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
            assert function is torch.ops.aten.detach.default, function
            return cls(arguments[0].halves)

        def dequantize(self) -> Any:
            return self.halves * 2

    def state(factor: float) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (2,))
        spread = distribute_tensor(whole(4, 2) * factor, mesh, [Shard(0)])
        local = spread.to_local()
        row = ShardedTensor("d", local, local.dtype, (2, 2), (4, 2), (2 * rank(), 0))
        row.data = spread
        codes = Codes(whole(4) * factor / 2)
        return {"q": ShardedTensor("q", codes, codes.dtype, (4,), (4,), (0,), replica_id=rank()), "d": row}

    anyckpt.torch.save(state(1.0), path, format="megatron-core")
    found = state(0.0)
    anyckpt.torch.load(found, path)
    return plain(found)


def test_tensors_that_stand_for_others_are_these(tmp_path: Path) -> None:
    import anyckpt

    for number, found in enumerate(on_ranks(2, quantized, str(tmp_path / "x"))):
        assert found == {"q": whole(4).tolist(), "d": whole(4, 2).tolist()[2 * number : 2 * number + 2]}
    assert anyckpt.open(tmp_path / "x")["q"].numpy().tolist() == whole(4).tolist()


def test_a_state_that_holds_itself_is_refused() -> None:
    from anyckpt.errors import UsageError
    from anyckpt.torch.describing import described
    from anyckpt.torch.megatron import ShardedObject

    state: dict[str, Any] = {"a": 1}
    state["itself"] = state
    for more in ({}, {"object": ShardedObject("o", 1, (1,), (0,))}):
        state.update(more)
        with pytest.raises(UsageError, match="hold themselves"):
            described(state)
