"""The main job, on a checkpoint made here: ``python3 tools/demo.py [DIRECTORY]``.

Makes a Llama checkpoint of 0.3 GB with a tokenizer and takes it from Hugging Face to a NeMo archive, to NeMo 2, to a
Megatron-Core distributed checkpoint and back to Hugging Face, each step by the command line in a process of its own.
What it has written is removed at the end, unless a DIRECTORY is named for it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from environment import LOCKS, ROOT, prepare

_STEPS = (
    ("nemo", "llama.nemo", "NeMo archive"),
    ("nemo2", "llama-nemo2", "NeMo 2 directory"),
    ("megatron-core", "llama-megatron", "Megatron-Core distributed"),
    ("hf", "llama-back", "Hugging Face, again"),
)
_HEAD = ("converted to", "time", "speed", "peak memory", "bit-exact with the original")
_ALL = 4 + len(_STEPS)
_SHAPE = "SMALL"


def main() -> None:
    started = time.monotonic()
    say(1, "an environment with anyckpt's few dependencies in .venv-core (under a minute, the first time)")
    python = prepare(".venv-core", lock=LOCKS / "core.txt", extras="test-core")
    with folder_for(sys.argv[1:]) as folder:
        source = folder / "llama-hf"
        say(2, "a Llama checkpoint of 0.3 GB in Hugging Face's layout, with random weights")
        make = f"from synthetic import *; from pathlib import Path; write_model(Path({str(source)!r}), {_SHAPE})"
        subprocess.run([str(python), "-c", make], check=True, cwd=ROOT / "benchmarks")
        anyckpt = [str(python), "-m", "anyckpt"]
        say(3, f"what is in it: anyckpt inspect {source.name}")
        subprocess.run([*anyckpt, "inspect", str(source)], check=True)
        rows = []
        current = source
        for number, (to, name, title) in enumerate(_STEPS, 4):
            say(number, f"anyckpt convert {current.name} {name} --to {to}; anyckpt diff {source.name} {name}")
            rows.append((title, *converted(anyckpt, source, current, folder / name, to)))
            print("      " + ", ".join(f"{head} {cell}" for head, cell in zip(_HEAD[1:], rows[-1][1:], strict=True)))
            current = folder / name
        say(_ALL, "all of it")
        print_table([_HEAD, *rows])
        if len(sys.argv) > 1:
            print(f"\nThe checkpoints are in {folder}; `{python} -m anyckpt inspect PATH` says what is in them.")
        else:
            print("\nThe checkpoints are removed; name a directory to keep them.")
    print(f"{time.monotonic() - started:.0f} s in all")
    if any(row[-1] == "NO" for row in rows):
        sys.exit("a conversion was not exact")


def say(number: int, text: str) -> None:
    """What is done now."""
    print(f"[{number}/{_ALL}] {text}", flush=True)


@contextmanager
def folder_for(arguments: Sequence[str]) -> Iterator[Path]:
    """The folder that is named, emptied of an earlier run; else one that is gone afterwards, whatever happens."""
    if not arguments:
        with tempfile.TemporaryDirectory(prefix=".anyckpt-demo-", dir=ROOT) as name:
            yield Path(name)
        return
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("llama-hf", *(name for _, name, _ in _STEPS)):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (folder / f".{name}.anyckpt-manifest.json").unlink(missing_ok=True)
    yield folder


def converted(anyckpt: Sequence[str], source: Path, current: Path, target: Path, to: str) -> tuple[str, str, str, str]:
    """Convert and compare; time, speed, peak memory, and whether it is exact.  Both show their own progress."""
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
    return (
        f"{seconds:.2f} s",
        f"{report['bytes_written'] / 1e9 / seconds:.2f} GB/s",
        f"{report['peak_rss_bytes'] / 1e6:.0f} MB",
        f"yes, {difference['compared']} tensors" if difference["equal"] else "NO",
    )


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
