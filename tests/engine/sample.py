"""A plan with every kind of part, and a program: ``sample.py SOURCE DESTINATION [resume | SHARE/OF [DEATH]]``."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from anyckpt import tensor as lazy
from anyckpt.dtypes import dtype
from anyckpt.engine import blocks, checksum, execute, files, run
from anyckpt.engine.destination import Destination, Share
from anyckpt.engine.plan import Computed, Literal, OutputFile, Part, Plan, SourceData, TensorData, small_file
from anyckpt.engine.shared_run import SharedRun, ShareReport
from anyckpt.storage import LocalFile, MemorySource
from anyckpt.tensor import Stored


def sample_plan(source: Path, *, directory: bool = True) -> Plan:
    """Three data files of tensors, literals, an artifact and checksums; metadata; a marker."""
    data = LocalFile(source)
    rows = data.size // 4 // 64
    whole = Stored(data, 0, dtype("float32"), (rows, 64))
    groups = whole[: rows // 8 * 8].reshape((rows // 8, 8, 64))
    views = {
        "plain": whole,
        "interleaved": lazy.concatenate([groups[:, 2:], groups[:, :2]], 1).reshape((-1, 64)),
        "transposed": whole[:100].transpose(),
        "cast": whole.cast("bfloat16"),
        "small": whole[3, :5],
        "empty": whole[:0],
        "padded": whole[: rows // 2].pad(0, rows),
    }
    outputs = []
    for number, names in enumerate((["small", "plain", "empty", "cast"], ["transposed", "interleaved"], ["padded"])):
        parts: list[Part] = [Literal(b"header of an odd length %d" % number)]
        for name in names:
            parts.append(TensorData(name, views[name]))
            parts.append(Computed(4, (len(parts) - 1,), lambda crcs: crcs[0].to_bytes(4, "little")))
        parts.append(SourceData(MemorySource(b"artifact" * 1000)))
        asked = tuple(i for i, part in enumerate(parts) if not isinstance(part, Computed))
        parts.append(Computed(4 * len(asked), asked, lambda crcs: b"".join(c.to_bytes(4, "little") for c in crcs)))
        outputs.append(OutputFile(f"data/{number}.bin", tuple(parts)))
    if not directory:
        return Plan("sample", (OutputFile("", outputs[0].parts),))
    marker = small_file("metadata.json", "{}", stage=2)
    return Plan("sample", (marker, *outputs, small_file("config.yaml", "a: 1\n")), links={"last": "data"})


def run_share(plan: Plan, destination: str | Destination, share: Share, **options: Any) -> ShareReport:
    """Write one share of a plan; options are those of ``SharedRun``."""
    return SharedRun(plan, destination, share.of, **options).write(share)


def shrink_blocks(nbytes: int, sync_every: int = 1 << 30) -> None:
    """Make blocks small, so that a small plan has many."""
    for module in (blocks, checksum, files):
        module.CHUNK_BYTES = nbytes
    run._SYNC_EVERY = sync_every
    files._DIRECT_MINIMUM = 4096


def die_after(writes: int) -> None:
    """Let the system kill this process in the place of its next write after so many."""
    left = itertools.count(writes, -1)
    write = files.BlockFile.write

    def writing(file: files.BlockFile, *arguments: Any) -> None:
        if next(left) <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, *arguments)

    files.BlockFile.write = writing  # type: ignore[method-assign]


def make_source(path: Path, nbytes: int) -> Path:
    path.write_bytes(np.random.default_rng(5).integers(0, 256, nbytes, dtype=np.uint8).tobytes())
    return path


def main(source: str, destination: str, *words: str) -> None:
    shrink_blocks(16384, sync_every=200_000)
    print("ready", flush=True)
    plan = sample_plan(Path(source))
    if words and "/" in words[0]:
        number, of = map(int, words[0].split("/"))
        if words[1:]:
            die_after(int(words[1]))
        run_share(plan, destination, Share(number, of), workers=2, source_paths=[source])
    else:
        execute.execute(plan, destination, resume="resume" in words, workers=2, source_paths=[source])


if __name__ == "__main__":
    main(*sys.argv[1:])
