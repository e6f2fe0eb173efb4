"""The main job, on a checkpoint made here: ``python3 tools/demo.py [DIRECTORY]``.

Makes a Llama checkpoint of 0.3 GB with a tokenizer and takes it from Hugging Face to a NeMo archive, to NeMo 2, to a
Megatron-Core distributed checkpoint and back to Hugging Face, each step by the command line in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from environment import LOCKS, ROOT, prepare

sys.path.insert(0, str(ROOT / "benchmarks"))

_STEPS = (
    ("nemo", "llama.nemo", "NeMo archive"),
    ("nemo2", "llama-nemo2", "NeMo 2 directory"),
    ("megatron-core", "llama-megatron", "Megatron-Core distributed"),
    ("hf", "llama-back", "Hugging Face, again"),
)


def main() -> None:
    python = prepare(".venv-core", lock=LOCKS / "core.txt", extras="test-core")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".anyckpt-demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = folder / "llama-hf"
    make = f"from synthetic import *; from pathlib import Path; write_model(Path({str(source)!r}), SMALL)"
    subprocess.run([str(python), "-c", make], check=True, cwd=ROOT / "benchmarks")
    anyckpt = [str(python), "-m", "anyckpt"]
    subprocess.run([*anyckpt, "inspect", str(source)], check=True)
    rows = []
    current = source
    for to, name, title in _STEPS:
        target = folder / name
        started = time.monotonic()
        done = subprocess.run(
            [*anyckpt, "convert", str(current), str(target), "--to", to, "--json"], check=True, stdout=subprocess.PIPE
        )
        seconds = time.monotonic() - started
        report = json.loads(done.stdout)
        compared = subprocess.run(
            [*anyckpt, "diff", str(source), str(target), "--json"], stdout=subprocess.PIPE, check=False
        )
        difference = json.loads(compared.stdout)
        exact = f"yes, {difference['compared']} tensors" if difference["equal"] else "NO"
        speed = report["bytes_written"] / 1e9 / seconds
        peak = report["peak_rss_bytes"] / 1e6
        rows.append((title, f"{seconds:.2f} s", f"{speed:.2f} GB/s", f"{peak:.0f} MB", exact))
        current = target
    head = ("converted to", "time", "speed", "peak memory", "bit-exact with the original")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print()
    for row in [head, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"\nThe checkpoints are in {folder}; `{python} -m anyckpt inspect PATH` says what is in them.")
    if any(row[-1] == "NO" for row in rows):
        sys.exit("a conversion was not exact")


if __name__ == "__main__":
    main()
