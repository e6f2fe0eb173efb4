"""Training state as torch itself saves it, seen by ``anyckpt inspect``."""

from __future__ import annotations

from pathlib import Path

import pytest

import anyckpt

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")


def test_rates_and_loss_scale_of_a_real_run_are_found(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 0.25}, {"params": [model.bias], "lr": torch.tensor(0.125)}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.5), step_size=1)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    state = {"model": model.state_dict(), "scaler": scaler.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    found = anyckpt.inspect(tmp_path / "run.pt")
    assert (found.learning_rates, found.loss_scale) == ([0.25, 0.125], 4096.0)
    megatron = {"grad_scaler": {"scale": torch.tensor([1024.0]), "growth_tracker": torch.tensor([0])}}
    torch.save({"model": model.state_dict(), "optimizer": megatron}, tmp_path / "megatron.pt")
    assert anyckpt.inspect(tmp_path / "megatron.pt").loss_scale == 1024.0
    torch.save(state, tmp_path / "without.pt")
    assert anyckpt.inspect(tmp_path / "without.pt").learning_rates == [0.5]
