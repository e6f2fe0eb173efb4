"""The storage for ``torch.distributed.checkpoint``: ordinary directories, whole or absent, and anything read."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks, outcomes

pytestmark = pytest.mark.peer


def trained(seed: int = 0) -> tuple[Any, Any]:
    """A tiny FSDP2 model of uneven rows with its optimizer, after two steps."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        train(model, optimizer, step)
    return model, optimizer


def train(model: Any, optimizer: Any, step: int) -> float:
    import torch

    generator = torch.Generator().manual_seed(step)
    loss = model(torch.randn(4, 6, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


def state_of(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": step, "schedule": {"decay": [0.9, 0.99], "name": "cosine"}}


def put(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import set_state_dict

    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def resumed(folder: str, ours: str) -> list[Any]:
    """The losses of an uninterrupted run, and of one that was saved and loaded, by what ``ours`` says is ours."""
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    path = os.path.join(folder, ours)
    model, optimizer = trained()
    state = state_of(model, optimizer, 2)
    writer = anyckpt.torch.dcp.Writer(path) if "save" in ours else dcp.FileSystemWriter(path)
    if "async" in ours:
        dcp.async_save(state, storage_writer=writer).result()
    else:
        dcp.save(state, storage_writer=writer)
    straight = [train(model, optimizer, step) for step in range(2, 4)]
    other, its_optimizer = trained(seed=1)
    found = state_of(other, its_optimizer, 0)
    found["schedule"] = {"decay": None, "name": None}
    dcp.load(found, storage_reader=anyckpt.torch.dcp.Reader(path) if "load" in ours else dcp.FileSystemReader(path))
    put(other, its_optimizer, found)
    again = [train(other, its_optimizer, step) for step in range(2, 4)]
    return [straight, again, found["step"], found["schedule"]]


@pytest.mark.parametrize("ours", ["save", "load", "save and load", "async save"])
def test_a_run_goes_on_as_if_uninterrupted(ours: str, tmp_path: Path) -> None:
    for straight, again, step, schedule in on_ranks(2, resumed, str(tmp_path), ours):
        assert again == straight
        assert (step, schedule) == (2, {"decay": [0.9, 0.99], "name": "cosine"})
    if "save" in ours:
        import anyckpt

        written = tmp_path / ours
        assert os.listdir(tmp_path) == [ours]
        assert sorted(os.listdir(written)) == [".anyckpt-manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"]
        verified = anyckpt.verify(written)
        assert not verified.problems
        assert verified.checked.digests


def loaded_whole(path: str) -> dict[str, list[float]]:
    """Weights of the model, read without distribution."""
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    state = {"model": {"0.weight": torch.zeros(7, 6), "2.bias": torch.zeros(3, dtype=torch.float64)}}
    dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader(path), no_dist=True)
    return {name: tensor.reshape(-1).tolist() for name, tensor in state["model"].items()}


def saved_weights(path: str) -> dict[str, list[float]]:
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    model, optimizer = trained()
    dcp.save(state_of(model, optimizer, 2), storage_writer=anyckpt.torch.dcp.Writer(path))
    return {name: tensor.full_tensor().reshape(-1).tolist() for name, tensor in model.state_dict().items()}


def test_another_layout_and_type_take_slices(tmp_path: Path) -> None:
    path = str(tmp_path / "whole")
    saved = on_ranks(2, saved_weights, path)[0]
    (found,) = on_ranks(1, loaded_whole, path)
    assert found == {name: saved[name] for name in found}


def replaced(path: str) -> list[Any]:
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    Path(path).mkdir(exist_ok=True)
    Path(path, "tokenizer.json").write_text("{}")
    for value in (1.0, 2.0):
        writer = anyckpt.torch.dcp.Writer(path)
        dcp.save({"w": torch.full((3,), value), "at": value}, storage_writer=writer)
    state = {"w": torch.zeros(3), "at": 0.0}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    try:
        dcp.save({"w": torch.zeros(3)}, storage_writer=anyckpt.torch.dcp.Writer(path, overwrite=False))
        refused = ""
    except dcp.api.CheckpointException as error:
        refused = str(error)
    return [state["w"].tolist(), state["at"], refused, sorted(os.listdir(path))]


def test_a_checkpoint_is_replaced_and_what_else_is_there_stays(tmp_path: Path) -> None:
    import anyckpt

    path = tmp_path / "last"
    (found,) = on_ranks(1, replaced, str(path))
    tensor, at, refused, names = found
    assert (tensor, at) == ([2.0] * 3, 2.0)
    assert "already exists; choose another path, or pass overwrite=True" in refused
    assert names == [".anyckpt-manifest.json", ".metadata", "__0_1.distcp", "tokenizer.json"]
    assert not anyckpt.verify(path).problems


def broken(path: str) -> list[Any]:
    """Saves twice: at first one rank fails in the middle."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch
    from anyckpt.errors import OutputError
    from anyckpt.torch.dcp import writer

    rank, write = dist.get_rank(), writer.write_files

    def failing(*arguments: Any, **options: Any) -> Any:
        write(*arguments, **options)
        raise OutputError("no space left for the output", path=path)

    if rank == 1:
        writer.write_files = failing
    state = {"w": torch.ones(2), f"of {rank}": rank}
    try:
        dcp.save(state, storage_writer=anyckpt.torch.dcp.Writer(path))
        told = ""
    except dcp.api.CheckpointException as error:
        told = str(error)
    gc.collect()
    dist.barrier()
    left = os.listdir(os.path.dirname(path))
    dist.barrier()
    writer.write_files = write
    dcp.save(state, storage_writer=anyckpt.torch.dcp.Writer(path))
    return [told, left, os.listdir(os.path.dirname(path))]


def test_a_rank_that_fails_stops_all_and_nothing_is_left(tmp_path: Path) -> None:
    for told, left, then in on_ranks(2, broken, str(tmp_path / "step")):
        assert "no space left for the output" in told
        assert left == []
        assert then == ["step"]


def killed(path: str) -> None:
    import signal

    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch
    from anyckpt.torch.dcp import writer

    if dist.get_rank() == 0:
        writer.SharedFolder.publish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    dcp.save({"w": torch.ones(2)}, storage_writer=anyckpt.torch.dcp.Writer(path))


def test_what_was_killed_looks_like_nothing(tmp_path: Path) -> None:
    from anyckpt.errors import FormatError

    found = outcomes(2, killed, str(tmp_path / "step"), seconds=6)
    assert found[0].status == -9
    assert not (tmp_path / "step").exists()
    import anyckpt

    with pytest.raises(FormatError):
        anyckpt.open(tmp_path / "step")
    on_ranks(1, saved_weights, str(tmp_path / "step"))
    assert os.listdir(tmp_path) == ["step"]


def filled(paths: list[str], rest: dict[str, Any]) -> list[Any]:
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    found = []
    for path in paths:
        state: dict[str, Any] = {"a": {"w": torch.zeros(2, 3, dtype=torch.bfloat16).T}, **rest}
        dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader(path))
        found.append([state["a"]["w"].tolist(), state.get("n")])
    return found


def test_other_formats_fill_a_state_by_their_names(tmp_path: Path) -> None:
    import torch

    import anyckpt

    state = {"a": {"w": torch.arange(6.0).reshape(3, 2).bfloat16()}, "n": 3}
    torch.save(state, tmp_path / "x.pt")
    anyckpt.save({"a.w": state["a"]["w"]}, tmp_path / "x.safetensors", to="safetensors")
    expected = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert on_ranks(1, filled, [str(tmp_path / "x.pt")], {"n": 0}) == [[[expected, 3]]]
    assert on_ranks(1, filled, [str(tmp_path / "x.safetensors")], {}) == [[[expected, None]]]


def fixture_of_torch(path: str) -> int:
    """Loads everything of a directory that torch wrote by torch's reader and by ours."""
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    metadata = dcp.FileSystemReader(path).read_metadata()
    compared = 0
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            ours, theirs = (torch.zeros(entry.size, dtype=entry.properties.dtype) for _ in range(2))
        else:
            ours = theirs = None
        one, other = {name: ours}, {name: theirs}
        dcp.load(one, storage_reader=anyckpt.torch.dcp.Reader(path))
        dcp.load(other, storage_reader=dcp.FileSystemReader(path))
        assert torch.equal(one[name], other[name]) if ours is not None else one == other, name
        compared += 1
    return compared


def test_what_torch_wrote_reads_as_torch_reads_it() -> None:
    (found,) = on_ranks(1, fixture_of_torch, "tests/fixtures/mcore/dcp_hsdp_tp_w4/ckpt")
    assert found > 3


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


class Setting:
    def __init__(self, value: int) -> None:
        self.value = value


def objects_of(folder: str) -> list[Any]:
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    path = os.path.join(folder, "harmful")
    dcp.save({"x": Harmful()}, storage_writer=anyckpt.torch.dcp.Writer(path))
    told = []
    for value in (Harmful(), Setting(1)):
        dcp.save({"x": value}, storage_writer=anyckpt.torch.dcp.Writer(path))
        try:
            dcp.load({"x": None}, storage_reader=anyckpt.torch.dcp.Reader(path))
        except dcp.api.CheckpointException as error:
            told.append(str(error))
    state: dict[str, Any] = {"x": None}
    dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader(path, classes=[Setting]))
    return [*told, state["x"].value]


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    (found,) = on_ranks(1, objects_of, str(tmp_path))
    assert "'x'" in found[0] and "posix.mkdir" in found[0]
    assert "test_dcp.Setting" in found[1] and "classes=" in found[1]
    assert found[2] == 1
    assert not Path("executed").exists()


def damaged(path: str) -> list[str]:
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    told = []

    def loading(found: str) -> None:
        try:
            dcp.load({"w": torch.zeros(3)}, storage_reader=anyckpt.torch.dcp.Reader(found))
        except dcp.api.CheckpointException as error:
            told.append(str(error))

    dcp.save({"w": torch.ones(3)}, storage_writer=anyckpt.torch.dcp.Writer(path))
    loading(f"{path}-none")
    os.unlink(os.path.join(path, "__0_0.distcp"))
    loading(path)
    try:
        dcp.save({"s": torch.ones(3).to_sparse()}, storage_writer=anyckpt.torch.dcp.Writer(path))
    except dcp.api.CheckpointException as error:
        told.append(str(error))
    return told


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    ((nothing, missing, sparse),) = on_ranks(1, damaged, str(tmp_path / "x"))
    assert "x-none: does not exist" in nothing
    assert "__0_0.distcp: tensor 'w': a file that the index needs cannot be opened" in missing
    assert "tensor 's': is of layout torch.sparse_coo" in sparse and "to_dense()" in sparse


def test_a_writer_goes_to_another_process(tmp_path: Path) -> None:
    import pickle

    import anyckpt.torch

    writer = anyckpt.torch.dcp.Writer(tmp_path / "x", workers=3)
    assert pickle.loads(pickle.dumps(writer)).checkpoint_id == str(tmp_path / "x")
    assert not writer.validate_checkpoint_id("s3://bucket/x")


def alone(path: str) -> Any:
    import torch
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    theirs, state = dcp.FileSystemWriter(f"{path}-theirs"), {"w": torch.zeros(2)}
    dcp.save({"w": torch.ones(2)}, storage_writer=theirs, use_collectives=False)
    dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader(f"{path}-theirs"))
    assert state["w"].tolist() == [1.0, 1.0]
    try:
        dcp.save({"w": torch.ones(2)}, storage_writer=anyckpt.torch.dcp.Writer(path), use_collectives=False)
    except Exception as error:
        return str(error)
    return ""


def test_ranks_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    (found,) = on_ranks(1, alone, str(tmp_path / "x"))
    assert "none learns when all are done" in found
