"""What cannot be saved together is refused by name on every rank, and leaves nothing."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer


def pieces(case: str, rank: int) -> Any:
    """What a rank claims to have of an (4, 6) tensor: two by three cells, or something wrong with them."""
    import torch

    from anyckpt.dtypes import dtype
    from anyckpt.torch.live import LiveObject, LivePiece, LiveState

    whole = torch.arange(24.0).reshape(4, 6)
    cells = [(0, 0), (0, 3), (2, 0), (2, 3)]
    own = cells[:2] if rank == 0 else cells[2:]
    shape, replica, kind, objects = (4, 6), 0, "float32", []
    if case == "hole" and rank == 1:
        own = own[:1]
    elif case == "doubled" and rank == 1:
        own = cells[1:]
    elif case == "overlap" and rank == 1:
        own = [(1, 0), *own[1:]]
    elif case == "only replicas":
        replica = rank
    elif case == "shape" and rank == 1:
        shape = (5, 6)
    elif case == "dtype" and rank == 1:
        kind = "int32"
    elif case == "outside" and rank == 1:
        own = [(2, 0), (3, 3)]
    elif case == "object":
        objects = [LiveObject("seed", rank, lambda value: None)]
    elif case == "grid" and rank == 0:
        objects = [LiveObject("rng/shard_0_2", 1, lambda value: None, 0, ("rng", (0,), (2,)))]
    elif case == "lambda" and rank == 1:
        objects = [LiveObject("function", lambda: 1, lambda value: None)]
    found = [
        LivePiece("layers.w", dtype(kind), shape, at, whole[0:2, 0:3].to(getattr(torch, kind)), replica) for at in own
    ]
    return LiveState(found, objects)


def refused(case: str, folder: str) -> str:
    from anyckpt.errors import AnyckptError
    from anyckpt.torch import saving
    from anyckpt.torch.collectives import Ranks
    from anyckpt.torch.options import Options

    ranks = Ranks()

    def describe() -> Any:
        if case == "raises" and ranks.rank == 1:
            raise ValueError("out of memory")
        return pieces(case, ranks.rank)

    path = os.path.join(folder, "checkpoint")
    try:
        saving.write(saving.prepare(describe, path, Options(), ranks), path, ranks)
    except (AnyckptError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (
            "hole",
            r"'layers.w': is not written exactly once .*\[4, 6\].*2 x 2 cells.*missing \[2:4, 3:6\]",
        ),
        ("doubled", r"MappingError: tensor 'layers.w': is there twice.*\[0:2, 3:6\] of \[4, 6\].*ranks 0, 1"),
        (
            "overlap",
            r"'layers.w': is not written.*4 x 2 cells.*missing \[3:4, 0:3\]; twice \[1:2, 0:3\] \(from ranks 0, 1\)",
        ),
        ("only replicas", r"'layers.w': is not written exactly once.*missing \[2:4, 0:3\], \[2:4, 3:6\]"),
        ("shape", r"'layers.w': ranks have the tensor with another shape.*\[4, 6\] on rank 0; \[5, 6\] on rank 1"),
        ("dtype", r"'layers.w': ranks have the tensor with another element type.*float32 on rank 0; int32 on rank 1"),
        ("outside", r"'layers.w': a shard of rank 1 lies outside the tensor.*within \[4, 6\].*\[3:5, 3:6\]"),
        ("object", r"'seed': an object differs between ranks.*one value on rank 0; one value on rank 1"),
        ("grid", r"'rng': objects of a grid are missing.*\[2\].*missing \[1\]"),
        ("lambda", r"UsageError: tensor 'function': an object of the state cannot be pickled"),
        ("raises", r"(RankError: rank 1 failed, and so all stop \(found )?ValueError: out of memory"),
    ],
)
def test_what_does_not_fit_together_is_named_on_every_rank(case: str, told: str, tmp_path: Path) -> None:
    import re

    for message in on_ranks(2, refused, case, str(tmp_path)):
        assert re.search(told, message), message
    assert os.listdir(tmp_path) == []


def failing_disk(folder: str, after: int) -> str:
    """Save twice: whole, then with a disk that is full on rank 1 after so many writes."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import anyckpt.torch
    from anyckpt.engine import files
    from anyckpt.errors import OutputError

    mesh = init_device_mesh("cpu", (2,))
    state = {"w": distribute_tensor(torch.ones(3 << 20), mesh, [Shard(0)])}
    anyckpt.torch.save(state, os.path.join(folder, "first"))
    written = 0
    really = files._write_all

    def full(descriptor: int, data: Any, offset: int) -> None:
        nonlocal written
        written += 1
        if dist.get_rank() == 1 and written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(descriptor, data, offset)

    files._write_all = full
    try:
        anyckpt.torch.save(state, os.path.join(folder, "second"))
    except OutputError as error:
        told = str(error)
    else:
        return "saved"
    with suppress(OutputError):
        anyckpt.torch.save(state, os.path.join(folder, "first"), overwrite=True)
    files._write_all = really
    anyckpt.torch.save({"v": torch.zeros(3)}, os.path.join(folder, "second"))
    return told


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_on_one_rank_fails_all_and_leaves_what_was_there(after: int, tmp_path: Path) -> None:
    import anyckpt

    for told in on_ranks(2, failing_disk, str(tmp_path), after):
        assert "no space left for the output" in told
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]
    assert anyckpt.open(tmp_path / "first")["w"].numpy().sum() == 3 << 20
    assert list(anyckpt.open(tmp_path / "second")) == ["v"]


def existing(path: str) -> str:
    import torch

    import anyckpt.torch
    from anyckpt.errors import OutputError

    try:
        anyckpt.torch.save({"w": torch.zeros(2)}, path)
    except OutputError as error:
        return str(error)
    return "saved"


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert all("already exists" in told for told in on_ranks(2, existing, str(tmp_path / "x")))


def asked_otherwise(folder: str) -> list[str]:
    """What a rank is told if the two are asked for different things; nothing is left, and none waits."""
    import torch
    import torch.distributed as dist

    import anyckpt.torch
    from anyckpt.errors import UsageError

    rank, told = dist.get_rank(), []
    state = {"w": torch.ones(2)}
    anyckpt.torch.save(state, os.path.join(folder, "whole"))
    save, load = anyckpt.torch.save, anyckpt.torch.load
    for call in (
        lambda: save(state, os.path.join(folder, f"x{rank}")),
        lambda: save(state, os.path.join(folder, "y"), format="dcp" if rank else "torch"),
        lambda: save(state, os.path.join(folder, "z"), asynchronous=bool(rank)),
        lambda: load(state, os.path.join(folder, "whole" if rank else "other")),
        lambda: load(
            state, os.path.join(folder, "whole"), parallel_load=True, exchange=("all-gather", "broadcast")[rank]
        ),
        lambda: load(state, os.path.join(folder, "whole"), verify=bool(rank)),
    ):
        try:
            call()
        except UsageError as error:
            told.append(error.problem.rpartition(": ")[2])
    return told


def test_ranks_that_are_asked_for_different_things_are_told(tmp_path: Path) -> None:
    told = on_ranks(2, asked_otherwise, str(tmp_path))
    name = "name of the checkpoint"
    assert told == [[name, "format", "asynchronous", name, "exchange", "verify"]] * 2
    assert os.listdir(tmp_path) == ["whole"]
