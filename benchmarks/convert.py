"""Conversions against ``cp -r`` + ``sync`` of the same bytes, side by side, durable on disk.

    python benchmarks/convert.py --directory /a/disk [--model llama|mixtral|deepseek] [--size 0|2|4] [--runs 5]

Every round times a copy and each conversion once, in turn, with the source in the page cache; the table gives the
medians and the median of the rounds' ratios.  Each conversion runs in a process of its own, whose peak resident set
is what the command line itself reports.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import (
    DEEPSEEK_SMALL,
    DEEPSEEK_TWO_GB,
    FOUR_GB,
    MIXTRAL_SMALL,
    MIXTRAL_TWO_GB,
    SMALL,
    TWO_GB,
    Shape,
    write_model,
)

SHAPES: dict[str, dict[int, Shape]] = {
    "llama": {0: SMALL, 2: TWO_GB, 4: FOUR_GB},
    "mixtral": {0: MIXTRAL_SMALL, 2: MIXTRAL_TWO_GB},
    "deepseek": {0: DEEPSEEK_SMALL, 2: DEEPSEEK_TWO_GB},
}
"""By model and gigabytes; 0 is just enough to see that the script works."""

TARGETS = {"llama": ("megatron-core", "nemo"), "mixtral": ("megatron-core",), "deepseek": ("megatron-core",)}
"""What is written from Hugging Face; Megatron-Core's, whose experts of all layers are one tensor, is also read back."""


def timed_copy(source: Path, target: Path) -> float:
    """Seconds that ``cp -r`` and ``sync`` take."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    return time.monotonic() - started


def convert(source: Path, target: Path, to: str) -> dict[str, Any]:
    """The command line's own report, with the wall time of the whole process as ``process_seconds``."""
    started = time.monotonic()
    command = [sys.executable, "-m", "anyckpt", "convert", str(source), str(target), "--to", to, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    report: dict[str, Any] = json.loads(done.stdout)
    report["process_seconds"] = time.monotonic() - started
    return report


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.with_name(f".{path.name}.anyckpt-manifest.json").unlink(missing_ok=True)


def warm(path: Path) -> None:
    """Read every file, so that it is in the page cache."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            subprocess.run(["cat", str(file)], check=True, stdout=subprocess.DEVNULL)


def run(directory: Path, shape: Shape, targets: tuple[str, ...], runs: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    hf = directory / "hf"
    if not hf.exists():
        write_model(hf, shape)
    megatron = directory / "megatron"
    if not megatron.exists():
        convert(hf, megatron, "megatron-core")
    subprocess.run(["sync"], check=True)
    jobs = [(f"hf -> {to}", hf, to) for to in targets] + [("megatron-core -> hf", megatron, "hf")]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in jobs}
    ratios: dict[str, list[float]] = {name: [] for name, _, _ in jobs}
    peak: dict[str, int] = {name: 0 for name, _, _ in jobs}
    copies: list[float] = []
    for number in range(runs):
        for name, source, to in jobs:
            warm(source)
            copy = timed_copy(source, directory / "copy")
            remove(directory / "copy")
            subprocess.run(["sync"], check=True)
            target = directory / ("out.nemo" if to == "nemo" else "out")
            warm(source)
            report = convert(source, target, to)
            remove(target)
            subprocess.run(["sync"], check=True)
            copies.append(copy)
            seconds[name].append(report["process_seconds"])
            ratios[name].append(report["process_seconds"] / copy)
            peak[name] = max(peak[name], report["peak_rss_bytes"])
            print(f"round {number + 1} {name}: cp {copy:.2f} s, anyckpt {report['process_seconds']:.2f} s", flush=True)
    print(f"\n{shape.nbytes / 1e9:.2f} GB, median of {runs}; cp -r + sync {statistics.median(copies):.2f} s")
    print("| conversion | seconds | GB/s | times cp | peak RSS |")
    print("|---|---|---|---|---|")
    for name, _, _ in jobs:
        middle = statistics.median(seconds[name])
        ratio = statistics.median(ratios[name])
        speed = shape.nbytes / 1e9 / middle
        print(f"| {name} | {middle:.2f} | {speed:.2f} | {ratio:.2f} | {peak[name] / 1e6:.0f} MB |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", choices=tuple(SHAPES), default="llama")
    parser.add_argument("--size", type=int, choices=(0, 2, 4), default=2, help="gigabytes; 4 is Llama's alone")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    chosen = SHAPES[options.model].get(options.size)
    if chosen is None:
        parser.error(f"there is no {options.model} of {options.size} GB")
    run(options.directory / f"{options.model}-{options.size}gb", chosen, TARGETS[options.model], options.runs)
