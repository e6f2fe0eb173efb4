"""What a conversion from one bucket to another takes: seconds, the share of the link, the processors' time and memory.

    python benchmarks/between_buckets.py --directory /a/disk --megabytes 100

Puts a sparse model behind a store that answers after 30 ms and carries so many megabytes in a second each way
(``far_store.py``), and converts it into the same store, in a new process.  Shares of the link are of what the store
sent and of what it received, over the whole run and between the first tenth of the bytes and the last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from far_store import TICK
from startup import sparse_model
from synthetic import SMALL, TWO_GB

_HERE = Path(__file__).parent
_SHAPES = {"small": SMALL, "2gb": TWO_GB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", choices=_SHAPES, default="2gb")
    parser.add_argument("--to", default="megatron-core")
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--megabytes", type=float, default=100)
    options = parser.parse_args()
    folder: Path = options.directory / "buckets"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sparse_model(folder / "model", _SHAPES[options.model], 1 << 30)
    link = ["--milliseconds", str(options.milliseconds), "--megabytes", str(options.megabytes)]
    store = subprocess.Popen(
        [sys.executable, str(_HERE / "far_store.py"), str(folder), *link],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert store.stdin is not None
    assert store.stdout is not None
    credentials = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    environment = {**os.environ, "AWS_ENDPOINT_URL": store.stdout.readline().strip(), **credentials}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = ["convert", "s3://a/model", "s3://b/out", "--to", options.to, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "anyckpt", *words], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    command = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    store.stdin.write("\n")
    store.stdin.flush()
    asked = json.loads(store.stdout.readline())
    store.kill()
    shutil.rmtree(folder)
    told = json.loads(done.stdout)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ways = ("sent", "received")
    print(
        json.dumps(
            {
                "mb": round(told["bytes_written"] / 1e6),
                "seconds": round(told["seconds"], 2),
                "command_seconds": round(command, 2),
                "share_of_link": [round(asked[way] / 1e6 / options.megabytes / told["seconds"], 3) for way in ways],
                "when_steady": [round(steady(asked["ticks"][way]) / 1e6 / options.megabytes, 3) for way in ways],
                "processor_seconds": round(used, 2),
                "processor_seconds_per_gb": round(used / told["bytes_written"] * 1e9, 2),
                "processor_seconds_of_store": round(asked["processor_seconds"], 2),
                "memory_mb": round(told["peak_rss_bytes"] / 1e6),
                "requests": asked["requests"],
                "load": os.getloadavg()[0],
            }
        )
    )


def steady(ticks: dict[str, int]) -> float:
    """Bytes in a second that passed between the first tenth of them and the last."""
    total, before, inside, seconds = sum(ticks.values()), 0, 0, 0.0
    first, last = min(map(int, ticks)), max(map(int, ticks))
    for tick in range(first, last + 1):
        passed = ticks.get(str(tick), 0)
        if total / 10 <= before and before + passed <= total * 9 / 10:
            inside += passed
            seconds += TICK
        before += passed
    return inside / seconds if seconds else 0.0


if __name__ == "__main__":
    main()
