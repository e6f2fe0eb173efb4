"""The checkpoints that are mutated: small ones of real software, of every format, as path -> bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.support import fixture_path

Tree = dict[str, bytes]
"""A checkpoint: paths below its root and their contents; a single file has the path ``"/NAME"``."""

_LARGE = 60_000  # a tokenizer of that size teaches nothing

SEEDS: dict[str, str] = {
    "hf": "families/llama/hf",
    "hf quantized": "quant/nvfp4_b/hf",
    "peft": "families/lora_llama/hf_adapter",
    "safetensors": "families/lora_llama/hf_adapter/adapter_model.safetensors",
    "torch": "legacy/zoo_kinds/zip.pt",
    "torch, legacy stream": "legacy/zoo_views/legacy.pt",
    "torch, tar": "legacy/zoo_legacy_tar/old.pt",
    "lightning": "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt",
    "lightning, sharded": "nemo/lightning_fsdp2/m-step=2.ckpt",
    "dcp": "mcore/dcp_fsdp_w2/ckpt",
    "megatron-core": "mcore/gpt_opt_plain/ckpt",
    "megatron-core-zarr": "mcore/zarr_v012_w2_flat/ckpt",
    "megatron-lm": "legacy/megatron_gpt_tp1_pp1_release",
    "nemo": "nemo/nemo1_basic_v3_0_0/toy.nemo",
    "nemo, ranks": "nemo/nemo1_mp_tp2/model.nemo",
    "nemo2": "nemo/nemo2_llama_hftok/model",
}
"""Name -> fixture."""


@cache
def seed(name: str) -> Tree:
    """The checkpoint of that name."""
    path = fixture_path(SEEDS[name])
    if path.is_file():
        return {f"/{path.name}": path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "expected.json")
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in files
        if file.stat().st_size < _LARGE or "tokenizer" not in file.name
    }


def written(tree: Tree, folder: Path, inside: Callable[[str], bool]) -> Path:
    """The tree on disk; the path to open.

    Args:
        tree: what to write.
        folder: an empty one.
        inside: whether a path stays below the root; others are left out.
    """
    root = folder / "checkpoint"
    alone = next((path for path in tree if path.startswith("/")), None)
    if alone is not None:
        target = folder / alone[1:]
        target.write_bytes(tree[alone])
        return target
    root.mkdir()
    for path, data in tree.items():
        target = root / path
        if not inside(path) or any(parent.is_file() for parent in target.parents) or target.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return root
