"""Commands beside what anybody would do instead, in alternating pairs: processor seconds, page faults and wall time.

    python benchmarks/pairs.py --directory /dev/shm/pairs [--only NAME ...] [--pairs 5] [--size 0|2] [--json FILE]

Every case is a process of ours and one to compare it with (``cat`` of the same files, ``import numpy``, the
``safetensors`` package), which take turns; processor seconds (user and system, also of their threads) stay the same on
a busy machine, so that medians of them are compared, and wall time is beside them.  A directory in memory leaves the
disk out.  What a case needs is made once, before it.  Cases whose rival is not installed are measured alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import SMALL, TWO_GB, LlamaShape, write_model

TINY = LlamaShape(layers=2, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=256)
ANYCKPT = [sys.executable, "-m", "anyckpt"]
NUMPY = [sys.executable, "-c", "import numpy"]
NOTHING: list[str] = []
SETTINGS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


@dataclass
class Cost:
    """What one run of a process took."""

    seconds: float
    cpu: float
    faults: int
    peak: int


@dataclass
class Case:
    """Two commands.

    Attributes:
        name: of the case.
        ours: its command; ``OUT`` in it is a path that does not exist.
        rival: what to compare it with; none if there is nothing.
        goal: the ratio of processor seconds to reach, or seconds per gigabyte if there is no rival.
        nbytes: what seconds are divided by, beyond those of ``base``; 0 if they are not.
        base: a command whose processor seconds are no part of the work: the start.  Beside a rival, the ratio without
            them is told too.
        make: what there must be before.
    """

    name: str
    ours: list[str]
    rival: list[str] = field(default_factory=list)
    goal: float = 1.0
    nbytes: int = 0
    base: list[str] = field(default_factory=list)
    make: Callable[[], object] = lambda: None


def cost(command: list[str], out: Path) -> Cost:
    """Run a command, with ``OUT`` made new and removed after."""
    started = time.monotonic()
    argv = [word.replace("OUT", str(out)) for word in command]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **SETTINGS})
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: diff found a difference
        sys.exit(f"{' '.join(argv)} failed")
    for path in out.parent.glob(f"*{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_minflt, usage.ru_maxrss * 1024)


def measured(case: Case, pairs: int, folder: Path) -> dict[str, Any]:
    """Medians over pairs, after one run of each that is not counted."""
    maker = multiprocessing.get_context("fork").Process(
        target=case.make
    )  # whose memory is not that of what is measured
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(f"{case.name} cannot be prepared")
    commands = {"ours": case.ours, "rival": case.rival, "base": case.base}
    costs: dict[str, list[Cost]] = {role: [] for role, command in commands.items() if command}
    for number in range(pairs + 1):
        for role, found in costs.items():
            one = cost(commands[role], folder / "OUT")
            if number:
                found.append(one)
    found = {role: _median(several) for role, several in costs.items()}
    ours = found["ours"]
    result: dict[str, Any] = {
        "name": case.name,
        "goal": case.goal,
        **{role: asdict(one) for role, one in found.items()},
    }
    if case.nbytes:
        beyond = max(0.0, ours.cpu - (found["base"].cpu if case.base else 0.0))
        result["cpu_per_gb"] = beyond / (case.nbytes / 1e9)
        result["thousand_faults_per_gb"] = ours.faults / (case.nbytes / 1e9) / 1000
    if case.rival:
        ratios = [a.cpu / max(b.cpu, 1e-3) for a, b in zip(costs["ours"], costs["rival"], strict=True)]
        result["ratio"] = statistics.median(ratios)
    if case.rival and case.base:
        turns = zip(costs["ours"], costs["base"], costs["rival"], strict=True)
        result["ratio_beyond_start"] = statistics.median([(a.cpu - b.cpu) / max(c.cpu, 1e-3) for a, b, c in turns])
    return result


def _median(several: list[Cost]) -> Cost:
    return Cost(
        *(statistics.median([getattr(one, key) for one in several]) for key in ("seconds", "cpu", "faults", "peak"))
    )  # type: ignore[arg-type]


def quantized(source: Path, target: Path, algorithm: str) -> None:
    """A folder of quantized weights, made once."""
    if not target.exists():
        command = [*ANYCKPT, "convert", str(source), str(target), "--to", "hf", "--quantize", algorithm]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def many_tensors(path: Path, count: int) -> None:
    """A safetensors file of many tensors of 16 bytes."""
    if path.exists():
        return
    header = {
        f"layers.{number}.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16 * number, 16 * number + 16]}
        for number in range(count)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * count))


READ_ALL = """
import sys, glob, anyckpt
weights = anyckpt.open(sys.argv[1]).weights()
held = {name: tensor.numpy() for name, tensor in weights.items()}
total = sum(int(array.view("u1").reshape(-1)[::4096].sum()) for array in held.values() if array.size)
"""
READ_ALL_SAFETENSORS = """
import sys, glob, numpy, ml_dtypes
from safetensors import safe_open
held = {}
for file in glob.glob(sys.argv[1] + "/*.safetensors"):
    with safe_open(file, "RIVAL") as opened:
        for name in opened.keys():
            held[name] = opened.get_tensor(name)
AS = lambda array: array.view("u1") if "RIVAL" == "np" else array.view(__import__("torch").uint8)
total = sum(int(AS(array).reshape(-1)[::4096].sum()) for array in held.values())
"""
COLUMNS = """
import sys, anyckpt
weights = anyckpt.open(sys.argv[1]).weights()
for name, tensor in weights.items():
    if name.endswith("_proj.weight"):
        tensor.box((0, 512), (tensor.shape[0], 16)).numpy()
"""
COLUMNS_SAFETENSORS = """
import sys, glob, numpy, ml_dtypes
from safetensors import safe_open
for file in glob.glob(sys.argv[1] + "/*.safetensors"):
    with safe_open(file, "np") as opened:
        for name in opened.keys():
            if name.endswith("_proj.weight"):
                opened.get_slice(name)[:, 512:528]
"""
TINY_CONVERSIONS = """
import sys, anyckpt
for number in range(50):
    anyckpt.convert(sys.argv[1], sys.argv[2], to="megatron-core", overwrite=True)
"""


def cases(folder: Path, shape: LlamaShape) -> list[Case]:
    """All of them."""
    tiny, model, other = folder / "tiny", folder / "model", folder / "other"
    third, adapter, wide = folder / "third", folder / "adapter", folder / "wide"
    peers = importlib.util.find_spec("safetensors") is not None
    torch = peers and importlib.util.find_spec("torch") is not None
    nbytes = shape.nbytes

    def make_models() -> None:
        if not model.exists():
            write_model(tiny, TINY)
            write_model(model, shape)
            for copy in (other, third):
                shutil.copytree(model, copy)
                for file in copy.glob("*.safetensors"):
                    content = bytearray(file.read_bytes())
                    for start in range(1 << 20, len(content), 1 << 12):  # another last bit of an element in each page
                        content[start] ^= 1
                    file.write_bytes(content)

    def make_wide() -> None:
        make_models()
        if not wide.exists():
            command = [*ANYCKPT, "convert", str(model), str(wide), "--to", "hf", "--dtype", "fp32"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def make_adapter() -> None:
        make_models()
        if adapter.exists():
            return
        adapter.mkdir()
        import numpy as np

        header, parts, at = {}, [], 0
        for name, dimensions in shape.tensors().items():
            if "_proj" not in name:
                continue
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            for role, size in (("lora_A", (16, dimensions[1])), ("lora_B", (dimensions[0], 16))):
                data = np.random.default_rng(at).standard_normal(size).astype(np.float32).tobytes()
                header[f"{stem}.{role}.weight"] = {
                    "dtype": "F32",
                    "shape": size,
                    "data_offsets": [at, at + len(data)],
                }
                parts.append(data)
                at += len(data)
        text = json.dumps(header).encode()
        (adapter / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
        modules = sorted({name.split(".")[-2] for name in shape.tensors() if "_proj" in name})
        settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": modules}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))

    def cat(*folders: Path) -> list[str]:
        return ["sh", "-c", " ; ".join(f"cat {one}/*.safetensors > /dev/null" for one in folders)]

    def script(text: str, *words: Path | str) -> list[str]:
        return [sys.executable, "-c", text, *map(str, words)]

    found = [
        Case("version", [*ANYCKPT, "--version"], NUMPY, 0.6, make=make_models),
        Case("inspect tiny", [*ANYCKPT, "inspect", str(tiny)], NUMPY, 1.3, make=make_models),
        Case(
            "dry run tiny",
            [*ANYCKPT, "convert", str(tiny), "OUT", "--to", "megatron-core", "--dry-run"],
            NUMPY,
            1.6,
            make=make_models,
        ),
    ]

    def reading(name: str, goal: float, *words: str, of: tuple[Path, ...] = (model,)) -> Case:
        sides = {"MODEL": str(model), "SAME": str(model) + "/.", "OTHER": str(other)}
        tinies = dict.fromkeys(sides, str(tiny))
        ours, base = ([*ANYCKPT, *(to.get(word, word) for word in words)] for to in (sides, tinies))
        return Case(name, ours, cat(*of), goal, base=base, make=make_models)

    found += [
        reading("diff equal", 3, "diff", "MODEL", "SAME", of=(model, model)),
        reading("diff different", 6, "diff", "MODEL", "OTHER", of=(model, other)),
        reading("verify --deep", 4, "verify", "MODEL", "--deep"),
        reading("inspect --stats", 6, "inspect", "MODEL", "--stats"),
        reading("inspect --digest", 3, "inspect", "MODEL", "--digest"),
    ]

    def converting(name: str, source: Path, size: int, goal: float, *words: str, make: Callable[[], object]) -> Case:
        command = [*ANYCKPT, "convert", str(source), "OUT", *words]
        return Case(name, command, NOTHING, goal, size, [*command, "--dry-run"], make)

    found += [
        converting("bf16 to fp32", model, 2 * nbytes, 1.0, "--to", "hf", "--dtype", "fp32", make=make_models),
        converting("fp32 to bf16", wide, 2 * nbytes, 1.0, "--to", "hf", "--dtype", "bf16", make=make_wide),
        converting("hf to megatron-core", model, nbytes, 0.6, "--to", "megatron-core", make=make_models),
    ]
    for algorithm in ("fp8_blocks", "mxfp4", "nvfp4"):
        codes = folder / algorithm
        found.append(
            converting(
                f"{algorithm} to bf16",
                codes,
                nbytes,
                1.5,
                "--to",
                "hf",
                "--dtype",
                "bf16",
                make=lambda codes=codes, algorithm=algorithm: (make_models(), quantized(model, codes, algorithm)),  # type: ignore[misc]
            )
        )
        found.append(
            converting(
                f"bf16 to {algorithm}", model, nbytes, 1.0, "--to", "hf", "--quantize", algorithm, make=make_models
            )
        )
    average = [*ANYCKPT, "average", str(model), str(other), str(third), "-o", "OUT"]
    merge = [*ANYCKPT, "merge-lora", str(model), str(adapter), "OUT"]
    start = [*ANYCKPT, "convert", str(model), "OUT", "--to", "hf", "--dry-run"]
    found += [
        Case("average of 3", average, NOTHING, 2.0, nbytes, start, make_models),
        Case("merge-lora r16", merge, NOTHING, 1.5, nbytes, start, make_adapter),
        Case(
            "all to numpy",
            script(READ_ALL, model),
            script(READ_ALL_SAFETENSORS.replace("RIVAL", "np"), model) if peers else NOTHING,
            1.0,
            make=make_models,
        ),
        Case(
            "all to numpy, torch",
            script(READ_ALL, model),
            script(READ_ALL_SAFETENSORS.replace("RIVAL", "pt"), model) if torch else NOTHING,
            1.0,
            make=make_models,
        ),
        Case(
            "16 columns",
            script(COLUMNS, model),
            script(COLUMNS_SAFETENSORS, model) if peers else NOTHING,
            2.0,
            make=make_models,
        ),
        Case("50 tiny conversions", script(TINY_CONVERSIONS, tiny, "OUT"), NOTHING, 0.7, make=make_models),
    ]
    for count, goal in ((10_000, 1.0), (100_000, 10.0)):
        file = folder / f"{count}.safetensors"
        for to in ("dcp", "torch", "safetensors"):
            command = [*ANYCKPT, "convert", str(file), "OUT", "--to", to]
            found.append(
                Case(
                    f"{count:,} tensors to {to}",
                    command,
                    NOTHING,
                    goal,
                    make=lambda file=file, count=count: many_tensors(file, count),  # type: ignore[misc]
                )
            )
    return found


def shown(result: dict[str, Any]) -> str:
    """A row of the table."""
    ours = result["ours"]
    value = result["ratio"] if "ratio" in result else result.get("cpu_per_gb", ours["cpu"])
    unit = "x" if "ratio" in result else " s/GB" if "cpu_per_gb" in result else " s"
    rival = f"{result['rival']['cpu']:.2f}" if "rival" in result else ""
    beyond = f"{result['ratio_beyond_start']:.2f}x" if "ratio_beyond_start" in result else ""
    faults = f"{ours['faults'] / 1000:,.0f}"
    return (
        f"| {result['name']} | {ours['cpu']:.2f} | {rival} | {value:.2f}{unit} | {beyond} | {result['goal']:g} "
        f"| {faults} | {ours['seconds']:.2f} | {ours['peak'] / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of cases")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, choices=(0, 2), default=0, help="0.3 or 2.2 GB")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    results = []
    print("| work | CPU s | rival's | measured | beyond the start | goal | thousand faults | seconds | peak RSS |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases(arguments.directory, {0: SMALL, 2: TWO_GB}[arguments.size]):
        if not arguments.only or any(part in case.name for part in arguments.only):
            results.append(measured(case, arguments.pairs, arguments.directory))
            print(shown(results[-1]), flush=True)
    if arguments.json is not None:
        facts = {"python": sys.version.split()[0], "processors": os.cpu_count(), "results": results}
        arguments.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
