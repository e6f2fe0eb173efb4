"""What looking at a checkpoint far away takes: seconds, memory, requests and bytes.

    python benchmarks/remote.py --directory /a/disk

Puts sparse checkpoints (Llama 405B in 191 shards; 2,000 files of a distributed one, with few chunks and with many)
behind a store that answers after 30 ms and sends 100 MB in a second, and inspects each in a new process.  The memory
is what that takes beyond a process that has imported the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from startup import sparse_model
from synthetic import LLAMA_405B

_HERE = Path(__file__).parent
_INSPECT = """
import json, os, resource, sys, time
import anyckpt, numpy, obstore, anyckpt.storage.remote.places
from anyckpt.operations.inspect import inspect
from anyckpt.formats import registry
registry.facts()
before = int(open("/proc/self/statm").read().split()[1]) * 4096
start = time.perf_counter()
found = inspect(sys.argv[1])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, peak - before]))
"""


def measured(path: str, store: subprocess.Popen[str], environment: dict[str, str], runs: int) -> dict[str, object]:
    """Medians of inspecting a path."""
    rows = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "anyckpt", "inspect", path], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        command = time.perf_counter() - started
        requests, sent = _told(store)
        result = subprocess.run(
            [sys.executable, "-c", _INSPECT, path], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        _told(store)
        rows.append((command, *json.loads(result.stdout), requests, sent))
    command, seconds, memory, requests, sent = (statistics.median(row) for row in zip(*rows, strict=True))
    return {
        "command_seconds": round(command, 2),
        "seconds": round(seconds, 2),
        "memory_mb": round(memory / 1e6),
        "requests": int(requests),
        "mb": round(sent / 1e6, 1),
    }


def _told(store: subprocess.Popen[str]) -> tuple[int, int]:
    assert store.stdin is not None
    assert store.stdout is not None
    store.stdin.write("\n")
    store.stdin.flush()
    told = json.loads(store.stdout.readline())
    return sum(told["requests"].values()), told["sent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="*", default=[20_000, 1_000_000])
    parser.add_argument("--milliseconds", type=float, default=30)
    options = parser.parse_args()
    folder: Path = options.directory / "far"
    folder.mkdir(parents=True, exist_ok=True)
    sparse_model(folder / "llama-405b", LLAMA_405B, 5_000_000_000)
    for chunks in options.chunks:
        if not (folder / f"dcp-{chunks}").exists():
            (folder / f"dcp-{chunks}").mkdir()
            made = [sys.executable, str(_HERE / "scale_dcp.py"), "--chunks", str(chunks)]
            subprocess.run([*made, "--generate", str(folder / f"dcp-{chunks}")], check=True)
    store = subprocess.Popen(
        [sys.executable, str(_HERE / "far_store.py"), str(folder), "--milliseconds", str(options.milliseconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert store.stdout is not None
    address = store.stdout.readline().strip()
    credentials = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    environment = {**os.environ, "AWS_ENDPOINT_URL": address, **credentials}
    for name in ("llama-405b", *(f"dcp-{chunks}" for chunks in options.chunks)):
        print(json.dumps({"what": name, **measured(f"s3://far/{name}", store, environment, options.runs)}), flush=True)
    store.kill()


if __name__ == "__main__":
    main()
