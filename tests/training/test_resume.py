"""Training that is saved and resumed goes on as if it had not been interrupted: the loss is equal bit for bit.

On other layouts the state that is loaded is equal bit for bit; what is computed from it is, where a layout computes in
the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer

STEPS = 3


def transformer() -> Any:
    """A small transformer, the same in every process."""
    import torch

    torch.manual_seed(7)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(12)
            self.qkv = torch.nn.Linear(12, 36)
            self.out = torch.nn.Linear(12, 12)
            self.up = torch.nn.Linear(12, 20)
            self.down = torch.nn.Linear(20, 12)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            x = x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(19, 12)
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.head = torch.nn.Linear(12, 19, bias=False)

        def forward(self, tokens: Any) -> Any:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Model()


def laid_out(layout: str) -> Any:
    """The model on a layout, and its optimizer."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = transformer()
    world = dist.get_world_size()
    mlp = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            parallelize_module(block, mesh, mlp)
    elif layout in ("hsdp", "fsdp+tp"):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
        for block in model.blocks:
            if layout == "fsdp+tp":
                parallelize_module(block, mesh["inner"], mlp)
            fully_shard(block, mesh=mesh if layout == "hsdp" else mesh["outer"])
        fully_shard(model, mesh=mesh if layout == "hsdp" else mesh["outer"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def trained(model: Any, optimizer: Any, first: int) -> list[float]:
    """Losses of some steps on the same batches on every rank."""
    import torch

    losses = []
    for step in range(first, first + STEPS):
        tokens = torch.randint(0, 19, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step}


def resume(layout: str, path: str, form: str) -> Any:
    """Train on, from what another run saved; the step, the whole state, and the losses that follow."""
    from tests.training.test_save import plain
    from torch.distributed.checkpoint.state_dict import set_state_dict

    import anyckpt.torch

    model, optimizer = laid_out(layout)
    state = state_of(model, optimizer, 0)
    if form == "dcp of torch":
        import torch.distributed.checkpoint as dcp

        dcp.load(state, checkpoint_id=path)
    else:
        anyckpt.torch.load(state, path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    whole = plain(state_of(model, optimizer, state["step"]))
    return state["step"], whole, trained(model, optimizer, STEPS)


def run(layout: str, path: str, form: str) -> Any:
    """Train, save, train on."""
    from tests.training.test_save import plain

    import anyckpt.torch

    model, optimizer = laid_out(layout)
    trained(model, optimizer, 0)
    state = state_of(model, optimizer, STEPS)
    if form == "dcp of torch":
        import torch.distributed.checkpoint as dcp

        dcp.save(state, checkpoint_id=path)
    else:
        anyckpt.torch.save(state, path, format=form)
    return plain(state), trained(model, optimizer, STEPS)


@pytest.mark.parametrize(
    ("layout", "world", "form"),
    [
        ("fsdp", 2, "dcp"),
        ("fsdp", 2, "megatron-core"),
        ("fsdp", 2, "dcp of torch"),
        ("tp", 2, "dcp"),
        ("fsdp+tp", 4, "dcp"),
    ],
)
def test_resumed_training_is_the_same(tmp_path: Path, layout: str, world: int, form: str) -> None:
    path = str(tmp_path / "c")
    _, losses = on_ranks(world, run, layout, path, form)[0]
    step, _, again = on_ranks(world, resume, layout, path, "dcp")[0]
    assert step == STEPS
    assert again == losses


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp", 2), ("single", 1)),
        (("fsdp", 2), ("tp", 2)),
        (("tp", 2), ("fsdp", 2)),
        (("single", 1), ("fsdp", 2)),
        (("hsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp+tp", 4)),
    ],
)
def test_training_is_resumed_on_another_layout(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    from tests.training.test_save import assert_same

    path = str(tmp_path / "c")
    wanted, losses = on_ranks(before[1], run, before[0], path, "dcp")[0]
    step, state, again = on_ranks(after[1], resume, after[0], path, "dcp")[0]
    assert step == STEPS
    assert_same(state, wanted)
    assert again == pytest.approx(losses, rel=1e-5)


def test_torch_resumes_what_is_saved_here(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    _, losses = on_ranks(2, run, "fsdp", path, "dcp")[0]
    assert on_ranks(2, resume, "fsdp", path, "dcp of torch")[0][2] == losses
