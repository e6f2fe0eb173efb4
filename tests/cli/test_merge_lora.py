"""``anyckpt merge-lora``, and adapters in ``convert`` and ``inspect``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.operations.steps.joining import open_checkpoint

BASE = fixture_path("families/llama/hf")
ADAPTER = fixture_path("families/lora_llama/hf_adapter")


def test_merge(anyckpt: Runner, tmp_path: Path) -> None:
    done = anyckpt("merge-lora", BASE, ADAPTER, tmp_path / "out", "--to", "nemo2", "--scale", "0.5", "--json")
    assert done.code == 0, done.err
    assert done.json["format"] == "nemo2"
    assert "14 updates of rank 4, times 0.5" in done.json["notes"][0]
    text = anyckpt("merge-lora", BASE, ADAPTER, tmp_path / "hf")
    assert text.code == 0
    assert text.out.startswith(f"{tmp_path / 'hf'}: hf, 21 tensors")
    assert "note: merged with the LoRA adapter hf_adapter" in text.err
    names = {tensor.dtype.name for tensor in open_checkpoint(tmp_path / "hf").tensors.values()}
    assert names == {"float32"}
    cut = anyckpt("merge-lora", BASE, ADAPTER, tmp_path / "lm", "--to", "megatron-lm", "--tp", "2", "--dtype", "bf16")
    assert cut.code == 0
    assert open_checkpoint(tmp_path / "lm").layout.tensor_parallel == 2


def test_convert_and_inspect(anyckpt: Runner, tmp_path: Path) -> None:
    there = anyckpt("convert", ADAPTER, tmp_path / "n", "--to", "nemo2", "--config", BASE, "--adapter-form", "fused")
    assert there.code == 0, there.err
    assert "fused updates have rank 12 where the adapter had 4" in there.err
    shown = anyckpt("inspect", tmp_path / "n")
    line = next(line for line in shown.out.splitlines() if line.startswith("adapter"))
    assert "LoRA, rank 12, alpha 36 over the rank, fused, of" in line
    facts = anyckpt("inspect", ADAPTER, "--json").json["adapter"]
    assert facts["targets"] and facts["rank"] == 4
    back = anyckpt("convert", tmp_path / "n", tmp_path / "p", "--to", "peft", "--json")
    assert back.json["format"] == "peft"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("merge-lora", ADAPTER, BASE, "OUT"), "is no adapter"),
        (("merge-lora", BASE, ADAPTER), "Missing argument"),
        (("merge-lora", BASE, ADAPTER, "OUT", "--scale", "x"), "not a valid float"),
        (("merge-lora", BASE, ADAPTER, "OUT", "--scale", "nan"), "--scale must be a number"),
        (("merge-lora", BASE, ADAPTER, "OUT", "--to", "peft"), "is a model, and peft holds adapters"),
        (("merge-lora", BASE, ADAPTER, "OUT", "--to", "nothing"), "unknown format"),
        (("convert", ADAPTER, "OUT", "--to", "hf"), "is an adapter, and hf holds models"),
        (("convert", ADAPTER, "OUT", "--to", "nemo2"), "--config"),
        (("convert", BASE, "OUT", "--to", "nemo2", "--alpha", "3"), "is no adapter"),
    ],
)
def test_errors(words: tuple[str | Path, ...], problem: str, anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt(*(tmp_path / "out" if word == "OUT" else word for word in words))
    assert problem in found.error
    assert not (tmp_path / "out").exists()
