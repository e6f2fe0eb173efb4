"""Shares of conversions that are killed at random moments: ``python tools/soak_shares.py --rounds 100``.

Each round several processes do a conversion together, to one format after another, in blocks so small that each has
many.  One of them is killed (SIGKILL) at a random moment, once or several times, and started anew.  The output must be,
file by file and with its manifest, what one process writes, and nothing may be left beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "fixtures" / "families" / "llama" / "hf"
FORMATS = "hf nemo nemo2 torch safetensors lightning dcp megatron-core megatron-core-zarr megatron-lm meta npz".split()
SECONDS = 120


def start(output: Path, to: str, share: str = "") -> subprocess.Popen[str]:
    """A process of the command line with small blocks; without a share it does all."""
    program = ROOT / "tests" / "operations" / "shared_conversion.py"
    words = ["convert", str(SOURCE), str(output), "--to", to, "--workers", "1", *(["--share", share] if share else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), *sys.path])}
    return subprocess.Popen(
        [sys.executable, str(program), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for a process, which must do its part."""
    _, error = process.communicate(timeout=SECONDS)
    if process.returncode:
        raise SystemExit(f"a process failed: {error}")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def one_round(folder: Path, to: str, of: int, generator: random.Random) -> int:
    """Convert together, killing some; how many were killed while they were at work.

    Raises:
        SystemExit: the bytes are not those of one process, or something is left.
    """
    shared = folder / "shared"
    shared.mkdir()
    processes = {number: start(shared / "out", to, f"{number}/{of}") for number in range(1, of + 1)}
    begun = time.monotonic()
    kills = 0
    for _ in range(generator.randint(1, 3)):
        number = generator.choice(list(processes))
        victim = processes[number]
        if generator.random() < 0.7 and victim.stdout is not None:
            victim.stdout.readline()  # it has imported what it needs
        time.sleep(generator.uniform(0, 0.2))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        kills += victim.returncode == -signal.SIGKILL
        processes[number] = start(shared / "out", to, f"{number}/{of}")
    for process in processes.values():
        ended(process)
    if contents(shared) != contents(folder / to):
        found = sorted(os.listdir(shared))
        raise SystemExit(f"{to} by {of}: not what one process writes, after {time.monotonic() - begun:.1f} s: {found}")
    shutil.rmtree(shared)
    return kills


def soak(rounds: int, seed: int, folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Rounds one after another, and what happened in them."""
    generator = random.Random(seed)
    drawn: Counter[str] = Counter()
    kills = 0
    begun = time.monotonic()
    for number in range(rounds):
        to = FORMATS[number % len(FORMATS)]
        of = generator.choice(counts)
        if not (folder / to).exists():
            (folder / to).mkdir()
            ended(start(folder / to / "out", to))
        kills += one_round(folder, to, of, generator)
        drawn[f"{to} by {of}"] += 1
    seconds = round(time.monotonic() - begun, 1)
    return {"rounds": rounds, "killed": kills, "seconds": seconds, "conversions": dict(drawn)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 7], metavar="N")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(asked.rounds, asked.seed, Path(folder), asked.processes)))


if __name__ == "__main__":
    main()
