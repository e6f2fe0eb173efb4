"""One conversion by several processes: the same bytes as by one, whatever the format, and whoever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.sample import shrink_blocks
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import blocks, checksum, files, run

PROGRAM = Path(__file__).with_name("shared_conversion.py")
LLAMA = fixture_path("families/llama/hf")

CONVERSIONS: dict[str, dict[str, Any]] = {
    "hf": {"max_shard_size": "100KB"},
    "nemo": {},
    "nemo2": {},
    "torch": {},
    "safetensors": {"dtype": "bf16"},
    "lightning": {"sharded": True},
    "dcp": {},
    "megatron-core": {"dtype": "fp16"},
    "megatron-core-zarr": {},
    "megatron-lm": {"layout": anyckpt.LayoutRequest(tensor_parallel=2)},
    "megatron-bridge": {},
    "meta": {},
    "trtllm": {},
    "gguf": {},
    "npz": {},
    "peft": {},
    "diffusers": {"max_shard_size": 20_000},
    "whisper": {},
}
SOURCES = {
    "peft": fixture_path("families/lora_llama/hf_adapter"),
    "diffusers": fixture_path("diffusers/stable_diffusion"),
    "whisper": fixture_path("whisper/tiny.pt"),
}
READ_ONLY = {"deepspeed", "fsdp", "gpt-neox"}


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    before = (blocks.CHUNK_BYTES, run._SYNC_EVERY, files._DIRECT_MINIMUM)
    shrink_blocks(8192, sync_every=30_000)
    yield
    for module in (blocks, checksum, files):
        module.CHUNK_BYTES = before[0]
    run._SYNC_EVERY, files._DIRECT_MINIMUM = before[1:]


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an output with its manifest, by its name; links as what they refer to."""
    if path.is_file():
        return {"": path.read_bytes(), "manifest": (path.parent / f".{path.name}.anyckpt-manifest.json").read_bytes()}
    return {
        str(file.relative_to(path)): os.readlink(file).encode() if file.is_symlink() else file.read_bytes()
        for file in path.rglob("*")
        if file.is_symlink() or file.is_file()
    }


def test_every_format_that_is_written_is_among_them() -> None:
    assert set(anyckpt.formats()) - READ_ONLY == set(CONVERSIONS)


@pytest.mark.parametrize("to", CONVERSIONS)
def test_every_format_in_shares(to: str, tmp_path: Path) -> None:
    options, source = CONVERSIONS[to], SOURCES.get(to, LLAMA)
    anyckpt.convert(source, tmp_path / "one", to=to, **options)
    expected = contents(tmp_path / "one")
    for of in (1, 2, 4, 7):
        output = tmp_path / f"of-{of}"
        order = list(range(1, of + 1))
        random.Random(to).shuffle(order)
        written, missing = 0, None
        for number in order:
            assert output.exists() == (missing == ())
            done = anyckpt.convert(source, output, to=to, share=f"{number}/{of}", **options)
            written, missing = written + done.bytes_written, done.missing_shares
            assert done.share == f"{number}/{of}"
            later = order[order.index(number) + 1 :]
            assert set(done.missing_shares) <= {f"{other}/{of}" for other in later}
        assert contents(output) == expected
        assert written > 0.9 * sum(map(len, expected.values())) - len(expected) * 5000
    assert [name for name in os.listdir(tmp_path) if name.endswith("-partial")] == []


def test_other_operations_in_shares(tmp_path: Path) -> None:
    adapter = fixture_path("families/lora_llama/hf_adapter")
    ranks = fixture_path("legacy/megatron_gpt_tp2_pp2")
    layout = anyckpt.LayoutRequest(tensor_parallel=1, pipeline_parallel=1)
    for name, call in {
        "average": lambda path, **share: anyckpt.average([LLAMA, LLAMA], path, **share),
        "merge": lambda path, **share: anyckpt.merge_lora(LLAMA, adapter, path, **share),
        "reshard": lambda path, **share: anyckpt.reshard(ranks, path, layout=layout, **share),
    }.items():
        call(tmp_path / name)
        for number in (2, 1):
            call(tmp_path / f"{name}-shared", share=f"{number}/2")
        assert contents(tmp_path / f"{name}-shared") == contents(tmp_path / name)


def child(output: Path, share: str, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), *sys.path])}
    command = [sys.executable, str(PROGRAM), "convert", str(LLAMA), str(output), *options, "--share", share]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("to", "of", "kills"), [("nemo", 4, 0), ("megatron-core", 2, 1)])
def test_processes_at_once(to: str, of: int, kills: int, tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "one", to=to)
    output = tmp_path / "shared"
    generator = random.Random(to)
    for attempt in range(kills + 1):
        found = [child(output, f"{number}/{of}", "--to", to) for number in range(1, of + 1)]
        if attempt < kills:
            victim = generator.choice(found)
            assert victim.stdout is not None
            victim.stdout.readline()
            time.sleep(generator.uniform(0, 0.3))
            victim.send_signal(signal.SIGKILL)
        for process in found:
            told, error = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), error
            if process.returncode == 0:
                assert "share" in told or "tensors" in told
    assert contents(output) == contents(tmp_path / "one")
    assert [name for name in os.listdir(tmp_path) if name.endswith("-partial")] == []
