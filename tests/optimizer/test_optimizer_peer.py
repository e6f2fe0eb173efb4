"""What was laid out is loaded by PyTorch's optimizers and by Megatron-Core's loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.optimizer.test_write import bare, opened, state_of, written  # noqa: E402
from tests.support import fixture_path  # noqa: E402

pytestmark = pytest.mark.peer


def model_and_optimizer() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def train(model: Any, optimizer: Any, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("through", [["lightning"], ["megatron-core", "lightning"], ["dcp", "lightning"]])
def test_training_continues_bit_for_bit(through: list[str], tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 0, 3)
    saved = {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    source = tmp_path / "source.ckpt"
    torch.save(saved, source)
    expected = train(model, optimizer, 3, 3)
    path = source
    for number, form in enumerate(through):
        path = written(bare(opened(path)), form, tmp_path / f"{number}{'.ckpt' if form == 'lightning' else ''}")
    loaded = torch.load(path, weights_only=True)
    model, optimizer = model_and_optimizer()
    model.load_state_dict(loaded["state_dict"])
    optimizer.load_state_dict(loaded["optimizer_states"][0])
    assert train(model, optimizer, 3, 3) == expected


def test_megatron_core_loads_what_was_written(tmp_path: Path) -> None:
    checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    source = opened(fixture_path("mcore/gpt_opt_plain/ckpt"))
    path = written(bare(source), "megatron-core", tmp_path / "out")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loaded = checkpointing.load_plain_tensors(str(path))
        common = checkpointing.load_common_state_dict(str(path))
    finally:
        torch.distributed.destroy_process_group()
    names = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for slot, tensors in state_of(source).slots.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded[f"optimizer.state.{names[slot]}.{name}"], torch.from_numpy(tensor.numpy()))
    assert common["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    assert [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [10, 10]
