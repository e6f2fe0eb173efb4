"""Live state filled from checkpoints, ours and torch's, on the same layout and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks
from tests.training.test_save import assert_same, plain, sharded_state

pytestmark = pytest.mark.peer


def other_state(world: int) -> Any:
    """A state of the same shapes with other contents."""
    state = sharded_state(world, seed=1)
    state["step"] = 0
    state["optimizer"]["param_groups"][0].update(lr=0.0, betas=(0.0, 0.0))
    return state


def saved_and_loaded(path: str, saver: str, settings: dict[str, Any]) -> Any:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    world = dist.get_world_size()
    state = sharded_state(world)
    if saver == "dcp":
        dcp.save(state, checkpoint_id=path)
    else:
        anyckpt.torch.save(state, path, format=saver)
    other = other_state(world)
    report = anyckpt.torch.load(other, path, **settings)
    assert_same(plain(other), plain(state))
    assert report.missing == report.unexpected == ()
    return plain(state), report


@pytest.mark.parametrize("saver", ["dcp", "megatron-core", "megatron-core-zarr"])
def test_what_is_saved_is_loaded(tmp_path: Path, saver: str) -> None:
    import anyckpt.torch

    (state, _), _ = on_ranks(2, saved_and_loaded, str(tmp_path / "c"), saver, {})
    assert_same(anyckpt.torch.load(tmp_path / "c"), state if saver == "dcp" else flat_tensors(state))


def flat_tensors(state: Any) -> Any:
    """As Megatron-Core's files have it: tensors under their names, what is common nested."""
    from tests.training.test_save import flat

    found = {name: value for name, value in flat(state).items() if hasattr(value, "dtype")}
    return {**found, "optimizer": {"param_groups": state["optimizer"]["param_groups"]}, "step": 3}


def test_torchs_own_checkpoints_are_loaded(tmp_path: Path) -> None:
    on_ranks(2, saved_and_loaded, str(tmp_path / "c"), "dcp", {"workers": 1})


def loaded_elsewhere(path: str, settings: dict[str, Any]) -> Any:
    import torch.distributed as dist

    import anyckpt.torch

    other = other_state(dist.get_world_size())
    report = anyckpt.torch.load(other, path, **settings)
    return plain(other), report.bytes_read


def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path: Path) -> None:
    (state, _), _ = on_ranks(2, saved_and_loaded, str(tmp_path / "c"), "dcp", {})
    for world in (1, 3):
        for found, _ in on_ranks(world, loaded_elsewhere, str(tmp_path / "c"), {}):
            assert_same(found, state)


def test_with_parallel_load_every_byte_is_read_once(tmp_path: Path) -> None:
    (state, _), _ = on_ranks(2, saved_and_loaded, str(tmp_path / "c"), "dcp", {})
    each = on_ranks(3, loaded_elsewhere, str(tmp_path / "c"), {})
    once = on_ranks(3, loaded_elsewhere, str(tmp_path / "c"), {"parallel_load": True})
    for found, _ in once:
        assert_same(found, state)
    copies = 36 + 16 + 4 + 4  # bytes of the tensors that all ranks load
    assert sum(nbytes for _, nbytes in each) - sum(nbytes for _, nbytes in once) >= 2 * copies


def strictly(path: str) -> list[str]:
    """What becomes of names that only one side has, by strictness."""
    import logging

    import torch

    import anyckpt.torch
    from anyckpt.errors import AnyckptError
    from anyckpt.torch.options import STRICTNESS

    anyckpt.torch.save({"a": torch.ones(2), "b": torch.ones(2), "n": 1}, path)
    told = []
    for strictness in STRICTNESS:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("anyckpt.torch").addHandler(handler)
        state = {"a": torch.zeros(2), "c": torch.zeros(2), "n": 0}
        try:
            report = anyckpt.torch.load(state, path, strictness=strictness)
            outcome = f"a={state['a'].tolist()} n={state['n']} {report.unexpected} {report.missing}"
        except AnyckptError as error:
            outcome = f"{type(error).__name__} {error.problem}"
        logging.getLogger("anyckpt.torch").removeHandler(handler)
        told.append(f"{strictness}: {outcome} {'; '.join(lines)}".replace(path, "PATH"))
    return told


def test_strictness(tmp_path: Path) -> None:
    loaded = "a=[1.0, 1.0] n=1 ('c',) ('b',)"
    unexpected = "MappingError the state asks for what the checkpoint does not have "
    found = [one.replace(" (on rank 0)", "") for one in on_ranks(2, strictly, str(tmp_path / "c"))[1]]
    assert found == [
        f"assume_ok_unexpected: {unexpected}",
        f"log_unexpected: {loaded} PATH lacks c",
        f"log_all: {loaded} PATH lacks c; PATH has what no rank's state asks for: b",
        f"raise_unexpected: {unexpected}",
        f"raise_all: {unexpected}",
        f"return_unexpected: {loaded} ",
        f"return_all: {loaded} ",
        f"ignore_all: {loaded} ",
    ]


def test_one_process_loads_without_a_group(tmp_path: Path) -> None:
    import argparse
    import datetime
    import random

    import numpy as np
    import torch

    import anyckpt.torch
    from anyckpt.errors import MappingError, UnsafeError

    state = {
        "w": torch.arange(6.0).reshape(2, 3).t(),
        "random": random.getstate(),
        "numpy": np.random.RandomState(0).get_state(),
        "torch": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16, when=datetime.datetime(2026, 1, 2)),
        "pair": (torch.ones(2), {"x": {1, 2}}),
        "nested": {3: {"empty": {}}, 5: [1.5, None]},
    }
    anyckpt.torch.save(state, tmp_path / "c")
    fresh = {
        **dict.fromkeys(("random", "numpy", "args", "pair")),
        "w": torch.zeros(2, 3).t(),
        "torch": torch.zeros_like(state["torch"]),
        "nested": {3: {"empty": {}}, 5: None},
    }
    anyckpt.torch.load(fresh, tmp_path / "c", verify=True)
    assert torch.equal(fresh["w"], state["w"])
    assert torch.equal(fresh["torch"], state["torch"])
    assert torch.equal(fresh["pair"][0], torch.ones(2))
    assert fresh["pair"][1] == {"x": {1, 2}}
    assert fresh["args"] == state["args"]
    assert fresh["nested"] == state["nested"]
    random.setstate(fresh["random"])
    np.random.RandomState(1).set_state(fresh["numpy"])
    assert np.array_equal(fresh["numpy"][1], state["numpy"][1])

    found = anyckpt.torch.load(tmp_path / "c")
    assert found["nested"] == state["nested"] or found["nested"] == {"3": {"empty": {}}, "5": [1.5, None]}
    with pytest.raises(MappingError, match=r"'w': has another shape in the checkpoint \(expected \[3, 3\]"):
        anyckpt.torch.load({"w": torch.zeros(3, 3)}, tmp_path / "c")
    with pytest.raises(MappingError, match="'w': has another element type.*float16.*float32.*cast=True"):
        anyckpt.torch.load({"w": torch.zeros(3, 2, dtype=torch.float16)}, tmp_path / "c")
    half = torch.zeros(3, 2, dtype=torch.float16)
    anyckpt.torch.load({"w": half}, tmp_path / "c", cast=True)
    assert torch.equal(half, state["w"].half())

    anyckpt.torch.save({"own": Own(3)}, tmp_path / "own")
    holder = {"own": None}
    with pytest.raises(UnsafeError, match=r"'own': an object.*not built unasked.*Own.*classes="):
        anyckpt.torch.load(holder, tmp_path / "own")
    anyckpt.torch.load(holder, tmp_path / "own", classes=[Own])
    assert isinstance(holder["own"], Own)
    assert holder["own"].value == 3


class Own:
    def __init__(self, value: int) -> None:
        self.value = value


def test_a_model_is_loaded_from_any_format(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    import anyckpt.torch

    model = torch.nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save({"state_dict": model.state_dict(), "step": 4}, tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        for wrap in (lambda module: {"model": module}, lambda module: module.state_dict()):
            other = torch.nn.Linear(3, 2)
            anyckpt.torch.load(wrap(other), tmp_path / name)
            assert torch.equal(other.weight, model.weight)
    whole = anyckpt.torch.load(tmp_path / "m.pt")
    assert whole["step"] == 4
    assert torch.equal(whole["state_dict"]["bias"], model.bias)


def test_a_changed_checkpoint_is_not_loaded_when_it_is_to_be_verified(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch
    from anyckpt.errors import MappingError

    anyckpt.torch.save({"w": torch.arange(1000.0)}, tmp_path / "c")
    file = tmp_path / "c/__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.index(torch.arange(500.0, 502.0).numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(MappingError, match="is not what was written"):
        anyckpt.torch.load({"w": torch.zeros(1000)}, tmp_path / "c", verify=True)


def padded_vocabulary(path: str) -> list[Any]:
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.dtypes import dtype
    from anyckpt.torch import loading
    from anyckpt.torch.collectives import Ranks
    from anyckpt.torch.live import LivePiece, LiveState
    from anyckpt.torch.options import Options

    anyckpt.torch.save({"e": torch.arange(1.0, 11.0).reshape(5, 2)}, path)
    rank = dist.get_rank()
    part = torch.full((4, 2), 7.0)
    piece = LivePiece("e", dtype("float32"), (8, 2), (4 * rank, 0), part, 0, resizable=True)
    loading.fill(lambda: LiveState([piece]), path, Options(), Ranks())
    return part.tolist()


def test_a_vocabulary_that_is_padded_otherwise(tmp_path: Path) -> None:
    assert on_ranks(2, padded_vocabulary, str(tmp_path / "c")) == [
        [[1, 2], [3, 4], [5, 6], [7, 8]],
        [[9, 10], [0, 0], [0, 0], [0, 0]],
    ]


def stages(path: str, held: list[list[int]], action: str) -> Any:
    """A pipeline of which each rank has some layers, and random states of its own."""
    import torch
    import torch.distributed as dist

    import anyckpt.torch

    rank = dist.get_rank()
    value = 1.0 if action == "save" else 0.0
    state = {
        "model": {f"layers.{n}.w": torch.full((2,), value * n) for n in held[rank]},
        "seeds": {f"of layer {n}": int(value) * (n + 7) for n in held[rank]},
    }
    if action == "save":
        anyckpt.torch.save(state, path)
    else:
        report = anyckpt.torch.load(state, path, strictness="raise_all")
        assert report.missing == ()
        assert state["seeds"] == {f"of layer {n}": n + 7 for n in held[rank]}
    return {name: tensor.tolist() for name, tensor in state["model"].items()}


def test_stages_of_a_pipeline_are_divided_otherwise(tmp_path: Path) -> None:
    on_ranks(2, stages, str(tmp_path / "c"), [[0, 1], [2]], "save")
    for held in ([[2, 0], [1]], [[0, 1, 2]], [[0], [1], [2]]):
        found = on_ranks(len(held), stages, str(tmp_path / "c"), held, "load")
        assert found == [{f"layers.{n}.w": [float(n)] * 2 for n in own} for own in held]


def first_generation(path: str) -> list[Any]:
    import torch
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    import anyckpt.torch

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    made = sharded_tensor.rand(spec, 5, 2)
    anyckpt.torch.save({"w": made}, path)
    other = sharded_tensor.zeros(spec, 5, 2)
    anyckpt.torch.load({"w": other}, path)
    assert all(
        torch.equal(one.tensor, two.tensor) for one, two in zip(made.local_shards(), other.local_shards(), strict=True)
    )
    return [shard.tensor.tolist() for shard in made.local_shards()]


def test_sharded_tensors_of_the_first_generation(tmp_path: Path) -> None:
    import anyckpt.torch

    found = on_ranks(2, first_generation, str(tmp_path / "c"))
    assert anyckpt.torch.load(tmp_path / "c")["w"].tolist() == [row for (shard,) in found for row in shard]


def test_tensors_of_a_path_are_the_file_itself(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch

    anyckpt.torch.save({"w": torch.arange(5000.0)}, tmp_path / "m.safetensors", format="safetensors")
    found = anyckpt.torch.load(tmp_path / "m.safetensors")["w"]
    assert found.untyped_storage().nbytes() == (tmp_path / "m.safetensors").stat().st_size
    found.zero_()
    assert anyckpt.torch.load(tmp_path / "m.safetensors")["w"].sum() == torch.arange(5000.0).sum()


def test_an_optimizer_without_state_does_not_lose_what_was_saved(tmp_path: Path) -> None:
    import torch

    import anyckpt.torch
    from anyckpt.errors import MappingError

    def made() -> Any:
        model = torch.nn.Linear(3, 2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    first = made()
    first["model"](torch.ones(1, 3)).sum().backward()
    first["optimizer"].step()
    anyckpt.torch.save(first, tmp_path / "c")
    fresh = made()
    with pytest.raises(MappingError, match=r"'optimizer\.state\.0\.\w+': .*does not have yet.*get_state_dict"):
        anyckpt.torch.load(fresh, tmp_path / "c")
    fresh["model"](torch.ones(1, 3)).sum().backward()
    fresh["optimizer"].step()
    anyckpt.torch.load(fresh, tmp_path / "c")
    moments = fresh["optimizer"].state[fresh["model"].weight]["exp_avg"]
    assert torch.equal(moments, first["optimizer"].state[first["model"].weight]["exp_avg"])
    assert torch.equal(fresh["model"].weight, first["model"].weight)
