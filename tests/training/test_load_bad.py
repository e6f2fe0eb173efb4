"""What cannot be loaded is refused by name on every rank, and a rank that was killed leaves nothing in the way."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks, outcomes

pytestmark = pytest.mark.peer


def sharded(rows: int) -> Any:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    return {"w": distribute_tensor(torch.arange(float(rows * 3)).reshape(rows, 3), mesh, [Shard(0)]), "step": 1}


def saved(path: str) -> None:
    import anyckpt.torch

    anyckpt.torch.save(sharded(8), path)


def refused(path: str, case: str) -> str:
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.errors import AnyckptError

    state = sharded(8)
    rank = dist.get_rank()
    if case == "shape":
        state = sharded(9)
    elif case == "one rank's name" and rank == 1:
        state["v"] = torch.zeros(2)
    elif case == "another model":
        state = {"model": {"encoder": torch.zeros(3)}}
    elif case == "one rank's type" and rank == 1:
        state = {"w": torch.zeros(8, 3, dtype=torch.int32), "step": 1}
    try:
        anyckpt.torch.load(state, path)
    except AnyckptError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("shape", r"MappingError: .*'w': has another shape in the checkpoint.*expected \[9, 3\], found \[8, 3\]"),
        ("one rank's name", r"MappingError: .*'v': the state asks for what the checkpoint does not have"),
        ("one rank's type", r"MappingError: .*'w': has another element type.*expected int32, found float32"),
        ("another model", r"MappingError: .*'model.encoder': the state asks for what the checkpoint does not have"),
        ("missing file", r"FormatError: .*__1_0.distcp"),
        ("short file", r"FormatError: .*__1_0.distcp.*truncated"),
        ("nothing", r"FormatError: .*(does not exist|no such)"),
    ],
)
def test_what_does_not_fit_is_named_on_every_rank(case: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    on_ranks(2, saved, str(path))
    if case == "missing file":
        (path / "__1_0.distcp").unlink()
    elif case == "short file":
        os.truncate(path / "__1_0.distcp", 100)
    elif case == "nothing":
        path = tmp_path / "other"
    for message in on_ranks(2, refused, str(path), case):
        assert re.search(told, message), message


def killed_in_mid_save(path: str) -> str:
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.engine import files
    from anyckpt.torch.collectives import RankError

    if dist.get_rank() == 1:
        files._write_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        anyckpt.torch.save(sharded(8), path)
    except RankError as error:
        return str(error)
    return "saved"


def test_a_rank_that_is_killed_in_mid_save(tmp_path: Path) -> None:
    import anyckpt

    path = tmp_path / "c"
    found = outcomes(2, killed_in_mid_save, str(path), seconds=30)
    assert found[1].status == -signal.SIGKILL
    assert found[0].value.startswith("a rank did not come to the end of writing, and this one stops")
    assert not path.exists()
    on_ranks(2, saved, str(path))  # by the job that is started again
    assert anyckpt.open(path)["w"].shape == (8, 3)
    assert os.listdir(tmp_path) == ["c"]


def test_a_checkpoint_that_is_deleted_during_a_load_is_loaded_whole_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import torch

    import anyckpt.torch
    from anyckpt.errors import AnyckptError
    from anyckpt.torch import reading

    state = {f"w{n}": torch.full((1000,), float(n)) for n in range(8)}
    anyckpt.torch.save(state, tmp_path / "x")
    fill, done = reading._filling, []

    def deleting(*arguments: Any) -> Any:
        task = fill(*arguments)

        def filling() -> None:
            done.append(1)
            if len(done) == 4:
                shutil.rmtree(tmp_path / "x")
            task()

        return filling

    monkeypatch.setattr(reading, "_filling", deleting)
    other = {name: torch.zeros(1000) for name in state}
    try:
        anyckpt.torch.load(other, tmp_path / "x", workers=1)
    except AnyckptError:
        return
    assert all(torch.equal(other[name], tensor) for name, tensor in state.items())
