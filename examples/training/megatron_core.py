"""A small GPT of Megatron-Core's, saved by two tensor-parallel ranks while they train, and resumed by one.

On a machine without a GPU; with some, take NCCL and leave ``without_gpu`` out.
"""

import contextlib
import logging
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

import anyckpt.torch

VOCABULARY, LENGTH = 32, 8


def without_gpu():
    """Let Megatron-Core do without the device that it asks for, and without random states for dropout, which is off."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *device: None
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()


def small_gpt(ranks):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=ranks,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH)


def train(model, first, last):
    """Losses of some steps of gradient descent."""
    losses = []
    for step in range(first, last):
        tokens = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(step))
        positions = torch.arange(LENGTH).expand_as(tokens)
        future = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
        loss = model(tokens, positions, future, labels=tokens.roll(-1, 1)).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
        losses.append(round(loss.item(), 3))
    return losses


def saving(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    model = small_gpt(ranks)
    train(model, 0, 3)
    path = f"{folder}/iter_0000003"
    os.makedirs(path, exist_ok=True)
    dist.barrier()

    # What Megatron-Core does with a strategy of its own, with one of ours: here asynchronously.
    request = dist_checkpointing.save(
        {"model": model.sharded_state_dict(), "iteration": 3},
        path,
        sharded_strategy=anyckpt.torch.megatron.SaveStrategy(),
        async_sharded_save=True,
    )
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    losses = train(model, 3, 5)  # while another process writes
    queue.maybe_finalize_async_calls(blocking=True)
    if rank == 0:
        print(f"{ranks} ranks, steps 3 to 5:", losses)
    dist.destroy_process_group()


def resuming(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-again", rank=rank, world_size=ranks)
    model = small_gpt(ranks)
    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        f"{folder}/iter_0000003",
        sharded_strategy=anyckpt.torch.megatron.LoadStrategy(),
    )
    model.load_state_dict(state["model"])
    print(f"{ranks} rank, from iteration {state['iteration']}:", train(model, state["iteration"], 5))
    dist.destroy_process_group()


if __name__ == "__main__":
    without_gpu()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(saving, (2, folder), nprocs=2, start_method="fork")
        torch.multiprocessing.start_processes(resuming, (1, folder), nprocs=1, start_method="fork")
        print(sorted(os.listdir(f"{folder}/iter_0000003")))
