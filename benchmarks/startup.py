"""Start-up and planning: figures that must stay small however large the checkpoint is.

    python benchmarks/startup.py --directory /a/disk

Times ``import anyckpt``, ``anyckpt inspect`` of a sparse 100 GB ``.nemo`` in a new process, and the plans
(``--dry-run``) of conversions of a sparse Llama 405B in 191 shards and of a sparse DeepSeek-V3 in FP8, of 91,991
tensors in 163 shards, each with its peak memory.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import DEEPSEEK_V3, LLAMA_405B, Shape, write_model

_NEMO_TENSORS = 800
_NEMO_BYTES = 100_000_000_000


def timed(command: list[str], runs: int = 7) -> tuple[float, int]:
    """Median seconds of a command and its largest peak resident set in bytes."""
    seconds = []
    peak = 0
    for _ in range(runs):
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds.append(time.monotonic() - started)
        peak = max(peak, usage.ru_maxrss * 1024)
        if status:
            sys.exit(f"{' '.join(command)} failed")
    return statistics.median(seconds), peak


def write_sparse_nemo(path: Path) -> None:
    """A plain-tar ``.nemo`` of 100 GB whose tensors are holes in the file."""
    elements = _NEMO_BYTES // _NEMO_TENSORS // 2
    config = b"target: a.b.C\nnemo_version: 1.23.0\n"
    names = [f"encoder.layers.{i}.weight" for i in range(_NEMO_TENSORS)]
    with path.open("wb") as file:
        file.write(_member("./model_config.yaml", len(config)) + config.ljust(512, b"\0"))
        start = file.tell()
        file.write(b"\0" * 512)
        begin = file.tell()
        _write_sparse_zip(file, names, elements)
        length = file.tell() - begin
        file.write(b"\0" * (-length % 512) + b"\0" * 1024)
        file.seek(start)
        file.write(_member("./model_weights.ckpt", length))


def _member(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


def _write_sparse_zip(file: io.BufferedWriter, names: list[str], elements: int) -> None:
    pickled = _state_dict_pickle(names, elements)
    directory = b""
    begin = file.tell()
    count = 0
    records = [("archive/data.pkl", pickled, len(pickled))]
    records += [(f"archive/data/{i}", b"", 2 * elements) for i in range(len(names))]
    records.append(("archive/version", b"3\n", 2))
    for name, data, size in records:
        offset = file.tell() - begin
        encoded = name.encode()
        file.write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0, 0, 0, 0, 0, size, size, len(encoded), 0) + encoded)
        if data:
            file.write(data)
        else:
            file.seek(size, os.SEEK_CUR)
        extra = struct.pack("<HHQ", 1, 8, offset)
        header = struct.pack(
            "<IHHHHHHIIIHHHHHII",
            0x02014B50,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            size,
            size,
            len(encoded),
            len(extra),
            0,
            0,
            0,
            0,
            0xFFFFFFFF,
        )
        directory += header + encoded + extra
        count += 1
    at = file.tell() - begin
    file.write(directory)
    end = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0, 0, 0, 0, count, count, len(directory), at)
    locator = struct.pack("<IIQI", 0x07064B50, 0, at + len(directory), 1)
    file.write(end + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _state_dict_pickle(names: list[str], elements: int) -> bytes:
    out = [b"\x80\x02}("]
    for number, name in enumerate(names):
        key = str(number).encode()
        out += [
            b"X" + struct.pack("<I", len(name)) + name.encode(),
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nHalfStorage\n",
            b"X" + struct.pack("<I", len(key)) + key + b"X\x03\x00\x00\x00cpu",
            b"J" + struct.pack("<i", elements) + b"tQK\x00",
            b"J" + struct.pack("<i", elements) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*out, b"u."])


def sparse_model(folder: Path, shape: Shape, shard_bytes: int) -> tuple[Path, int]:
    """A model whose files have the right sizes and no data, and how many files there are."""
    if not folder.exists():
        # In a process of its own: what this one has held counts towards the peak of the processes that it starts.
        options = {"shard_bytes": shard_bytes, "sparse": True}
        context = multiprocessing.get_context("spawn")
        maker = context.Process(target=write_model, args=(folder, shape), kwargs=options)
        maker.start()
        maker.join()
    return folder, len(list(folder.glob("*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    folder: Path = parser.parse_args().directory
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "sparse-100gb.nemo"
    if not archive.exists():
        write_sparse_nemo(archive)
    llama, llama_shards = sparse_model(folder / "llama-405b", LLAMA_405B, 5_000_000_000)
    deepseek, deepseek_shards = sparse_model(folder / "deepseek-v3", DEEPSEEK_V3, 4_300_000_000)
    empty, _ = timed([sys.executable, "-c", "pass"])
    rows = [
        ("import anyckpt", [sys.executable, "-c", "import anyckpt"]),
        (
            f"inspect a .nemo of {archive.stat().st_size / 1e9:.0f} GB",
            [sys.executable, "-m", "anyckpt", "inspect", str(archive)],
        ),
    ]
    for to in ("megatron-core", "nemo"):
        command = ["convert", str(llama), str(folder / "none"), "--to", to, "--dry-run", "--json"]
        rows.append((f"plan Llama 405B ({llama_shards} shards) -> {to}", [sys.executable, "-m", "anyckpt", *command]))
    for to in ("megatron-core", "hf"):
        command = ["convert", str(deepseek), str(folder / "none"), "--to", to, "--dtype", "bf16", "--dry-run", "--json"]
        title = f"plan DeepSeek-V3 in FP8 ({deepseek_shards} shards) -> {to} in bf16"
        rows.append((title, [sys.executable, "-m", "anyckpt", *command]))
    print(f"An empty Python process takes {empty:.3f} s.\n\n| what | seconds | peak RSS |\n|---|---|---|")
    for title, command in rows:
        seconds, peak = timed(command)
        print(f"| {title} | {seconds:.3f} | {peak / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
