"""A small GPT trained with FSDP2 on two ranks: saved by both, resumed by both, by one process, and taken as weights."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import anyckpt
import anyckpt.torch


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, words=61, width=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, words)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(sharded):
    torch.manual_seed(0)
    model = GPT()
    if sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def state_of(model, optimizer, step):
    """What is saved: torch's own names, and of each tensor what this rank has."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step}


def trained(model, optimizer, first, steps):
    for step in range(first, first + steps):
        tokens = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def resumed(path, sharded):
    model, optimizer = made(sharded)
    state = state_of(model, optimizer, 0)
    anyckpt.torch.load(state, path)  # fills this rank's part of each tensor, whoever saved it
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer, state["step"]


def rank_main(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, optimizer = made(sharded=True)
    trained(model, optimizer, 0, steps=5)
    state = state_of(model, optimizer, 5)
    report = anyckpt.torch.save(state, "step-5")  # format="dcp"
    anyckpt.torch.save({"model": state["model"]}, "gpt.safetensors", format="safetensors")
    if rank == 0:
        print(f"{report.path}: {report.format}, written by two ranks: {sorted(os.listdir(report.path))[1:]}")
    uninterrupted = trained(model, optimizer, 5, steps=5)

    model, optimizer, step = resumed("step-5", sharded=True)
    again = trained(model, optimizer, step, steps=5)
    if rank == 0:
        print(f"resumed at step {step}, the same loss after five more: {again == uninterrupted}")
    dist.barrier()
    dist.destroy_process_group()


def main():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(rank_main, (f"{folder}/rendezvous",), nprocs=2, start_method="fork")

    model, optimizer, step = resumed("step-5", sharded=False)  # one process, no sharding
    weights = anyckpt.torch.load("gpt.safetensors")  # mapped from the file
    same = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    print(f"on one process at step {step}; gpt.safetensors has the same weights: {same}")
    trained(model, optimizer, step, steps=5)
    print(anyckpt.open("step-5"))


if __name__ == "__main__":
    main()
