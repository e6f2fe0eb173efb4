"""What a training loop waits for when it saves asynchronously; needs torch.

    OMP_NUM_THREADS=1 python benchmarks/training_async.py --directory /a/disk --size 2 --runs 5

Two ranks (processes of one gloo group) hold a model of ``--size`` GB with Adam's moments, in float32, as DTensors cut
along their rows.  Each run times, in turn and on both ranks at once, a copy of the rank's part into memory that is
there already (numpy, one thread), and what ``Saver.save`` takes until it returns, as it is and with a plan made each
time; then it waits until the checkpoint is published.  ``--peer`` adds ``torch.distributed.checkpoint.async_save`` with
a process of its own.  The first save, for which the system has to give memory, is told apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_COLUMNS = 1024


def state_of(nbytes: int, tensors: int) -> dict[str, Any]:
    """A model and its moments, evenly divided between the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    rows = nbytes // (3 * tensors * world * _COLUMNS * 4)

    def made() -> Any:
        return DTensor.from_local(torch.rand(rows, _COLUMNS), mesh, [Shard(0)])

    names = [f"layers.{number}.weight" for number in range(tensors)]
    return {
        "model": {name: made() for name in names},
        "optimizer": {"state": {name: {"exp_avg": made(), "exp_avg_sq": made()} for name in names}},
        "step": 0,
    }


def parts_of(state: Any) -> list[Any]:
    """This rank's elements, as arrays."""
    if isinstance(state, dict):
        return [part for value in state.values() for part in parts_of(value)]
    return [state.to_local().numpy()] if hasattr(state, "to_local") else []


Timing = tuple[float, float]
"""Seconds, and seconds in which the loop's thread computed, which other processes of the machine cannot make more."""


def timed(action: Callable[[], Any]) -> Timing:
    """Of the slowest rank, all of which begin together."""
    dist.barrier()
    started, computed = time.monotonic(), time.thread_time()
    action()
    seconds = torch.tensor([time.monotonic() - started, time.thread_time() - computed])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1])


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    from anyckpt.torch import Retention, Saver

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.ranks)
    state = state_of(int(options.size * 1e9), options.tensors)
    parts = parts_of(state)
    room = [np.ones_like(part) for part in parts]
    savers = {
        "save": Saver(f"{folder}/known", keep=Retention()),
        "save, planned each time": Saver(f"{folder}/planned", keep=Retention(), assume_constant_structure=False),
    }

    def memcpy() -> None:
        for there, part in zip(room, parts, strict=True):
            np.copyto(there, part)

    times: dict[str, list[Timing]] = {"memcpy": [], **{name: [] for name in savers}}
    first, publishing = {}, []
    memcpy()
    for run in range(options.runs + 3):
        for name, saver in savers.items():
            copying = timed(memcpy)
            seconds = timed(lambda saver=saver, run=run: saver.save(state, run))
            publishing.append(timed(saver.wait)[0])
            if run >= 3:
                times["memcpy"].append(copying)
                times[name].append(seconds)
            elif run == 0:
                first[name] = seconds[0]
    for saver in savers.values():
        saver.close()
    if options.peer:
        times["torch.distributed.checkpoint.async_save"] = peer(state, folder, options.runs)
    if rank == 0:
        print(
            f"{sum(part.nbytes for part in parts) / 1e9:.2f} GB on each of {options.ranks} ranks, {len(parts)} tensors"
        )
        base = [statistics.median(one[kind] for one in times["memcpy"]) for kind in (0, 1)]
        for name, found in times.items():
            wall, cpu = (statistics.median(one[kind] for one in found) for kind in (0, 1))
            spread = f"{min(found)[0]:.3f} to {max(found)[0]:.3f} s"
            print(
                f"{name:40} {wall:6.3f} s {wall / base[0]:5.2f} x memcpy, computing {cpu / base[1]:5.2f} x ({spread})"
            )
        print("first save: " + ", ".join(f"{seconds:.2f} s ({name})" for name, seconds in first.items()))
        print(f"until published: {statistics.median(publishing):.2f} s")
    dist.destroy_process_group()


def peer(state: dict[str, Any], folder: str, runs: int) -> list[Timing]:
    """What torch's own asynchronous saving blocks for."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    found = []
    for run in range(runs + 1):
        kept: list[Any] = []

        def save(run: int = run, kept: list[Any] = kept) -> None:
            kept.append(
                dcp.async_save(
                    state, checkpoint_id=f"{folder}/peer-{run}", async_checkpointer_type=AsyncCheckpointerType.PROCESS
                )
            )

        seconds = timed(save)
        kept[0].result()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(f"{folder}/peer-{run}")
        found += [seconds] if run else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--size", type=float, default=2.0, help="GB of the state, of all ranks together")
    parser.add_argument("--tensors", type=int, default=100, help="weights, each with two moments")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        mp.spawn(rank_main, args=(options, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
