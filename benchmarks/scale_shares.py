"""Plan a conversion of a model of 1 T parameters and divide it between 64 processes, which plan it alike.

    python benchmarks/scale_shares.py                        # to megatron-core
    python benchmarks/scale_shares.py --to hf nemo2 --fp8    # Kimi-K2 as it is published, in FP8

The model has Kimi-K2's shape and its files are sparse.  One rank's planning is timed in a process of its own, with its
largest resident set, with the collector tuned as by the command; the shares' bytes are compared with their mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic import KIMI_K2, write_model

OF = 64


def measure(source: str, to: str, options: dict[str, Any]) -> dict[str, Any]:
    """What one process takes until it could write, and how the work is divided."""
    started, cpu = time.monotonic(), time.process_time()
    gc.set_threshold(200_000, 20, 100)  # as the command line does
    from anyckpt.engine.destination import Share
    from anyckpt.engine.execute import peak_rss_bytes
    from anyckpt.engine.shared_run import SharedRun
    from anyckpt.formats import registry
    from anyckpt.operations.convert import planned
    from anyckpt.operations.options import ConvertOptions

    opened = registry.read(source)
    read = time.monotonic()
    plan = planned(opened, ConvertOptions(to=to, **options))
    made = time.monotonic()
    run = SharedRun(plan, f"{source}-{to}", OF, source_paths=[source])
    own = sum(block.nbytes for block in run._division.blocks(Share(1, OF)))
    ended = time.monotonic()
    facts = {
        "to": to,
        "tensors": len({part.name for part in plan.tensors()}),
        "bytes": plan.nbytes,
        "seconds": round(ended - started, 2),
        "of which opening": round(read - started, 2),
        "planning": round(made - read, 2),
        "dividing": round(ended - made, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_mb": peak_rss_bytes() >> 20,
        "first share": own,
    }
    sizes = [sum(block.nbytes for block in run._division.blocks(Share(number, OF))) for number in range(1, OF + 1)]
    mean = sum(sizes) / OF
    return {
        **facts,
        "share_gb": round(mean / 1e9, 2),
        "largest deviation": round(max(abs(s / mean - 1) for s in sizes), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", nargs="+", default=["megatron-core"])
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--source", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    options = {} if chosen.dtype is None else {"dtype": chosen.dtype}
    if chosen.source is not None:
        print(json.dumps(measure(chosen.source, chosen.to[0], options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(
            Path(folder) / "kimi-k2", replace(KIMI_K2, fp8=chosen.fp8), shard_bytes=16 << 30, sparse=True
        )
        for to in chosen.to:
            words = ["--source", str(source), "--to", to, *(["--dtype", chosen.dtype] if chosen.dtype else [])]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
            print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
