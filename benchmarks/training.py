"""Saving and loading the state of training ranks, against torch.distributed.checkpoint, Megatron-Core and ``cp``.

    python benchmarks/training.py --directory /a/disk [--runs 5] [--scale 1.0] [--ranks 2]

A model of 184 million parameters in float32 with Adam's moments, 2.2 GB, cut by rows over two ranks as FSDP2 cuts it.
Each run takes all rivals in turn, so that what else the machine does meets them alike; times are of all ranks together,
from one barrier to the next, durable as each makes it: ``cp`` is followed by ``sync`` of the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    hidden = int(1024 * scale**0.5) // 8 * 8
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (32000, hidden)}
    for layer in range(12):
        name = f"layers.{layer}"
        found |= {
            f"{name}.qkv.weight": (3 * hidden, hidden),
            f"{name}.qkv.bias": (3 * hidden,),
            f"{name}.out.weight": (hidden, hidden),
            f"{name}.norm.weight": (hidden,),
            f"{name}.up.weight": (4 * hidden, hidden),
            f"{name}.down.weight": (hidden, 4 * hidden),
        }
    return found


def state_of(scale: float, seed: int) -> dict[str, Any]:
    """Weights and Adam's moments, each rank's rows; the elements are random bits, of which no disk can make fewer."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(seed + dist.get_rank())

    def tensor(shape: tuple[int, ...]) -> Any:
        local = (shape[0] // dist.get_world_size(), *shape[1:])
        bits = torch.randint(0, 1 << 30, local, generator=generator, dtype=torch.int32)
        return DTensor.from_local(bits.view(torch.float32), mesh, [Shard(0)], run_check=False)

    model = {name: tensor(shape) for name, shape in shapes(scale).items()}
    moments = {
        name: {"exp_avg": tensor(shape), "exp_avg_sq": tensor(shape), "step": torch.tensor(3.0)}
        for name, shape in shapes(scale).items()
    }
    return {"model": model, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(model)}]}}


def rank_main(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.ranks)
    directory = options.directory / "training"
    state = state_of(options.scale, 0)
    jobs = rivals(state, state_of(options.scale, 1), directory)
    found: dict[str, list[float]] = {name: [] for name in jobs}
    extra: dict[str, int] = {}
    cpu: dict[str, float] = {}
    for run in range(options.runs + 1):
        for name, job in jobs.items():
            if rank == 0 and "load" not in name:
                shutil.rmtree(directory / job.output, ignore_errors=True)
            if rank == 0:
                subprocess.run(["sync"], check=True)
            dist.barrier()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started, processor = time.monotonic(), time.process_time()
            job.work()
            cpu[name] = time.process_time() - processor
            dist.barrier()
            if run:
                found[name].append(time.monotonic() - started)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            extra[name] = max(extra.get(name, 0), grown * 1024)
    if rank == 0:
        size = sum(file.stat().st_size for file in (directory / "ours").iterdir())
        print(table(found, extra, cpu, size))
        print(json.dumps(found))
        shutil.rmtree(directory)
    dist.barrier()
    dist.destroy_process_group()


class Job:
    def __init__(self, output: str, work: Callable[[], object]) -> None:
        self.output = output
        self.work = work


def rivals(state: dict[str, Any], other: dict[str, Any], directory: Path) -> dict[str, Job]:
    """What is timed, in turn; loads follow the saves whose output they read."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import anyckpt.torch

    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    path = {name: str(directory / name) for name in ("ours", "constant", "torch", "copy", "megatron")}

    def copy() -> None:
        if dist.get_rank() == 0:
            subprocess.run(["cp", "-r", path["ours"], path["copy"]], check=True)
            files = [str(file) for file in Path(path["copy"]).rglob("*") if file.is_file()]
            subprocess.run(["sync", *files, path["copy"]], check=True)

    def constant() -> None:
        anyckpt.torch.save(state, path["constant"], assume_constant_structure=True)

    jobs = {
        "save": Job("ours", lambda: anyckpt.torch.save(state, path["ours"])),
        "cp + sync": Job("copy", copy),
        "torch save": Job("torch", lambda: dcp.save(state, checkpoint_id=path["torch"])),
        "save, constant structure": Job("constant", constant),
        "load": Job("", lambda: anyckpt.torch.load(other, path["ours"])),
        "torch load": Job("", lambda: dcp.load(other, checkpoint_id=path["torch"])),
        "load, parallel": Job("", lambda: anyckpt.torch.load(other, path["ours"], parallel_load=True)),
    }
    try:
        from megatron.core import dist_checkpointing
    except ImportError:
        return jobs

    if not torch.cuda.is_available():  # Megatron-Core asks for a device that is not there
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.current_device = lambda: "cpu"

    def megatron() -> None:
        if dist.get_rank() == 0:
            os.makedirs(path["megatron"])
        dist.barrier()
        dist_checkpointing.save(sharded(state), path["megatron"])

    jobs["Megatron-Core save"] = Job("megatron", megatron)
    jobs["Megatron-Core load"] = Job("", lambda: dist_checkpointing.load(sharded(other), path["megatron"]))
    return jobs


def sharded(state: dict[str, Any]) -> dict[str, Any]:
    """The same state as Megatron-Core's entities."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, world = dist.get_rank(), dist.get_world_size()

    def entity(name: str, tensor: Any) -> Any:
        return ShardedTensor.from_rank_offsets(name, tensor.to_local(), (0, rank, world))

    found = {f"model.{name}": entity(f"model.{name}", tensor) for name, tensor in state["model"].items()}
    for name, slots in state["optimizer"]["state"].items():
        for slot in ("exp_avg", "exp_avg_sq"):
            found[f"optimizer.{slot}.{name}"] = entity(f"optimizer.{slot}.{name}", slots[slot])
    return found


def table(found: dict[str, list[float]], extra: dict[str, int], cpu: dict[str, float], size: int) -> str:
    lines = [
        f"{size / 1e9:.2f} GB, {os.cpu_count()} cores",
        "| | seconds | times cp | processor seconds of rank 0 | extra peak RSS of a rank |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found["cp + sync"], strict=True)]
        middle, ratio = statistics.median(seconds), statistics.median(ratios)
        lines.append(f"| {name} | {middle:.2f} | {ratio:.2f} | {cpu[name]:.2f} | {extra[name] / 1e6:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the model's size")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank >= 0:
        rank_main(options.rank, options, options.rendezvous)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--rendezvous", f"{folder}/rendezvous", "--rank"]
        quiet = {"OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, str(rank)], env={**os.environ, **quiet}) for rank in range(options.ranks)]
        for process in ranks:
            if process.wait():
                sys.exit(process.returncode)


if __name__ == "__main__":
    main()
