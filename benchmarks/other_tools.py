"""What other tools need for the same work, beside anyckpt: seconds, processor seconds, peak memory.

    OMP_NUM_THREADS=2 python benchmarks/other_tools.py --directory /a/disk [--size 0|2] [--runs 3]

Each piece of work is done in turn by anyckpt and by the tool that most people use for it, each in a process of its own,
with the source in the page cache and a ``sync`` before the clock stops; medians.  Imports of libraries are part of a
tool's time, as they are for whoever runs it.  Needs the ``test`` extra.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """Something that both can do.

    Attributes:
        title: what.
        source: name of what is read, in the directory.
        ours: arguments of anyckpt; ``OUT`` is the output.
        tool: which other tool does it.
        theirs: its program; ``IN`` is the source.
    """

    title: str
    source: str
    ours: tuple[str, ...]
    tool: str
    theirs: str


WORK = (
    Work(
        "DCP → one torch file",
        "dcp",
        ("convert", "IN", "OUT", "--to", "torch"),
        "torch `dcp_to_torch_save`",
        "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save; dcp_to_torch_save('IN', 'OUT')",
    ),
    Work(
        "torch file → safetensors",
        "model.pt",
        ("convert", "IN", "OUT", "--to", "safetensors"),
        "torch and safetensors",
        "import torch, safetensors.torch as s; s.save_file(torch.load('IN', weights_only=True), 'OUT')",
    ),
    Work(
        "hf → hf in other shards",
        "hf",
        ("convert", "IN", "OUT", "--to", "hf", "--max-shard-size", "500MB"),
        "transformers `save_pretrained`",
        "from transformers import AutoModelForCausalLM as A\n"
        "A.from_pretrained('IN', dtype='auto').save_pretrained('OUT', max_shard_size='500MB')",
    ),
    Work(
        "LoRA of rank 16 merged",
        "hf",
        ("merge-lora", "IN", "ADAPTER", "OUT"),
        "peft `merge_and_unload`",
        "from transformers import AutoModelForCausalLM as A; from peft import PeftModel as P\n"
        "P.from_pretrained(A.from_pretrained('IN', dtype='auto'), 'ADAPTER').merge_and_unload().save_pretrained('OUT')",
    ),
)

ADAPTER = """
from transformers import AutoModelForCausalLM as A; from peft import LoraConfig, get_peft_model
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
get_peft_model(A.from_pretrained('IN', dtype='auto'),
               LoraConfig(r=16, target_modules=names, init_lora_weights=False)).save_pretrained('OUT')
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def anyckpt(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "anyckpt", *arguments]


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds until it is durable, processor seconds, and the largest resident set in bytes.

    The last counts what this process held when it started the other one, which is why nothing large is imported here.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    subprocess.run(["sync"], check=True)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def prepare(directory: Path, size: int) -> None:
    """Make the sources that are not there."""
    sys.path.insert(0, str(Path(__file__).parent))
    from synthetic import SMALL, TWO_GB, write_model

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "hf").exists():
        write_model(directory / "hf", TWO_GB if size else SMALL)
    for name, to in (("dcp", "dcp"), ("model.pt", "torch")):
        if not (directory / name).exists():
            subprocess.run(anyckpt("convert", str(directory / "hf"), str(directory / name), "--to", to), check=True)
    if not (directory / "adapter").exists():
        code = ADAPTER.replace("IN", str(directory / "hf")).replace("OUT", str(directory / "adapter"))
        subprocess.run(python(code), check=True)


def shell(command: str, path: Path) -> None:
    subprocess.run(["sh", "-c", command, "sh", str(path)], check=True, stdout=subprocess.DEVNULL)


def run(directory: Path, runs: int) -> None:
    print("| work | by | seconds | processor seconds | peak memory |\n|---|---|---|---|---|")
    for work in WORK:
        found: dict[str, list[tuple[float, float, float]]] = {"anyckpt": [], work.tool: []}
        for _ in range(runs):
            for name, figures in found.items():
                target = directory / ("out.pt" if work.source == "dcp" else "out")
                paths = {"IN": directory / work.source, "OUT": target, "ADAPTER": directory / "adapter"}
                shell('find "$1" -type f -exec cat {} +', paths["IN"])
                if name == "anyckpt":
                    command = anyckpt(*(str(paths.get(word, word)) for word in work.ours))
                else:
                    code = work.theirs
                    for word, path in paths.items():
                        code = code.replace(f"'{word}'", repr(str(path)))
                    command = python(code)
                figures.append(measured(command))
                shell('rm -rf "$1" "$(dirname "$1")/.$(basename "$1").anyckpt-manifest.json"; sync', target)
        for name, figures in found.items():
            wall, used, memory = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"| {work.title} | {name} | {wall:.1f} | {used:.1f} | {memory / 1e6:,.0f} MB |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--size", type=int, choices=(0, 2), default=2, help="gigabytes; 0 just shows that it works")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    maker = multiprocessing.get_context("spawn").Process(target=prepare, args=(options.directory, options.size))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(maker.exitcode)
    run(options.directory, options.runs)
