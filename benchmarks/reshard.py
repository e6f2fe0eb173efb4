"""Changing the parallel layout of Megatron-LM rank folders, against ``cp -r`` + ``sync`` of the same bytes.

    python benchmarks/reshard.py --directory /a/disk [--runs 5] [--optimizer]

Cuts the 2 GB model TP1 -> TP4 x PP2 and TP8 -> TP1.  With ``--optimizer`` the model is the 0.3 GB one, whose fp32
master weights and moments bring it to 2.2 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import anyckpt
from anyckpt.checkpoint import OptimizerState, TrainingState
from anyckpt.dtypes import dtype
from anyckpt.tensor import Mapped
from convert import remove, timed_copy, warm
from synthetic import SMALL, TWO_GB, write_model

_GROUP = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "wd_mult": 1.0, "lr_mult": 1.0}


def with_synthetic_optimizer(checkpoint: anyckpt.Checkpoint) -> anyckpt.Checkpoint:
    """The checkpoint with Adam's state made of its own weights."""
    made: dict[str, Callable[[Any], Any]] = {
        "master": lambda weight: weight.astype("float32"),
        "exp_avg": lambda weight: weight.astype("float32") * 0.1,
        "exp_avg_sq": lambda weight: weight.astype("float32") ** 2,
    }
    slots = {
        slot: {name: Mapped((tensor,), dtype("float32"), make) for name, tensor in checkpoint.weights().items()}
        for slot, make in made.items()
    }
    groups = (_GROUP, {**_GROUP, "weight_decay": 0.0, "wd_mult": 0.0})
    state = OptimizerState(slots=slots, step=10, groups=groups)
    training = TrainingState(step=10, has_optimizer=True)
    return replace(checkpoint, optimizer=lambda: state, training=training)


def reshard(source: Path, target: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """The command line's own report, with the wall time of the whole process as ``process_seconds``."""
    command = ["reshard", str(source), str(target), "--tp", str(tensor), "--pp", str(pipeline), "--json"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "anyckpt", *command], check=True, stdout=subprocess.PIPE)
    report: dict[str, Any] = json.loads(done.stdout)
    report["process_seconds"] = time.monotonic() - started
    return report


def make_source(directory: Path, optimizer: bool, tensor: int) -> Path:
    target = directory / f"tp{tensor}"
    if not target.exists():
        hf = directory / "hf"
        if not hf.exists():
            write_model(hf, SMALL if optimizer else TWO_GB)
        opened = anyckpt.open(hf)
        anyckpt.convert(
            with_synthetic_optimizer(opened) if optimizer else opened,
            target,
            to="megatron-lm",
            optimizer="keep" if optimizer else "drop",
            layout=anyckpt.LayoutRequest(tensor_parallel=tensor),
        )
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--optimizer", action="store_true")
    options = parser.parse_args()
    directory = options.directory / ("ranks-optimizer" if options.optimizer else "ranks")
    directory.mkdir(parents=True, exist_ok=True)
    tp = 4 if options.optimizer else 8  # the small model has four query groups
    jobs = [("TP1 -> TP4 x PP2", 1, 4, 2), (f"TP{tp} -> TP1", tp, 1, 1)]
    print("| layout | bytes | seconds | times cp | peak RSS |\n|---|---|---|---|---|")
    for title, start, tensor, pipeline in jobs:
        source = make_source(directory, options.optimizer, start)
        subprocess.run(["sync"], check=True)
        seconds, ratios, peak, size = [], [], 0, 0
        for _ in range(options.runs):
            warm(source)
            copy = timed_copy(source, directory / "copy")
            remove(directory / "copy")
            subprocess.run(["sync"], check=True)
            warm(source)
            report = reshard(source, directory / "out", tensor, pipeline)
            remove(directory / "out")
            subprocess.run(["sync"], check=True)
            seconds.append(report["process_seconds"])
            ratios.append(report["process_seconds"] / copy)
            peak, size = max(peak, report["peak_rss_bytes"]), report["bytes_written"]
        middle, ratio = statistics.median(seconds), statistics.median(ratios)
        print(f"| {title} | {size / 1e9:.2f} GB | {middle:.2f} | {ratio:.2f} | {peak / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
