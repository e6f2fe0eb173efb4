"""Saves while it trains, and goes on where it was stopped; under torchrun each rank does the same."""

import os

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import anyckpt.torch


def state_of(model, optimizer, step):
    """What is saved: torch's own names, and each rank's shards if the model is sharded."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": step}


def train(folder, steps):
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = 0
    rules = anyckpt.torch.Retention(last=2, best=1, mode="min", forever_every=10)
    with anyckpt.torch.Saver(folder, keep=rules) as saver:
        newest = saver.latest()  # the newest that is whole; None at the first start
        if newest is not None:
            state = state_of(model, optimizer, step)
            anyckpt.torch.load(state, newest)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            step = state["step"]
        print(f"begins at step {step}")
        while step < steps:
            loss = model(torch.ones(2, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            # Waits for a copy in memory; the copy is written while the next steps are computed.
            saver.save(state_of(model, optimizer, step), step, metric=loss.item())
    return loss.item()


def main():
    train("run", steps=8)
    resumed = train("run", steps=14)
    print(sorted(name for name in os.listdir("run") if not name.startswith(".")))
    print(anyckpt.torch.latest("run"))
    print("as if it had never stopped:", resumed == train("other", steps=14))


if __name__ == "__main__":
    main()
