"""Every optimizer of torch goes on from what we carry, as if nothing had happened: by name and by number."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402

from anyckpt.operations.convert import convert  # noqa: E402

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)


def stepped(model: Any, optimizer: Any, count: int) -> list[Any]:
    for number in range(count):
        optimizer.zero_grad()
        inputs = torch.arange(8, dtype=torch.float32).reshape(2, 4) * 0.1 + number
        model.second(torch.tanh(model.first(inputs))).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_a_distributed_checkpoint_and_from_lightnings(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    warnings.simplefilter("ignore")
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer, 2)
    saved = {
        "epoch": 0, "global_step": 2, "pytorch-lightning_version": "2.4.0", "loops": {}, "lr_schedulers": [],
        "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()],
    }  # fmt: skip
    torch.save(saved, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "dcp", to="dcp", optimizer="keep")
    convert(tmp_path / "dcp", tmp_path / "b.ckpt", to="lightning", optimizer="keep")
    wanted = stepped(model, optimizer, 2)

    one = Model()
    own = OPTIMIZERS[name](one.parameters())
    weights, state = get_state_dict(one, own)
    loaded = {**weights, "optim": state}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    state = loaded.pop("optim")
    set_state_dict(one, own, model_state_dict=loaded, optim_state_dict=state)
    assert all(map(torch.equal, stepped(one, own, 2), wanted))

    again = torch.load(tmp_path / "b.ckpt", weights_only=True)
    two = Model()
    own = OPTIMIZERS[name](two.parameters())
    two.load_state_dict(again["state_dict"])
    own.load_state_dict(again["optimizer_states"][0])
    assert all(map(torch.equal, stepped(two, own, 2), wanted))
