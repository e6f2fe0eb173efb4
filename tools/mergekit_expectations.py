"""What mergekit makes of three small Llama models, as tests compare with it.

    pip install torch==2.13.0 mergekit==0.1.5 && python tools/mergekit_expectations.py tests/fixtures/mergekit

Writes ``base``, ``a`` and ``b`` (transformers' own), a recipe and its result per case, and the versions.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

_GRADIENT = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


def _over_base(method: str, own: list[dict[str, Any]], **shared: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": numbers} for name, numbers in zip("ab", own, strict=True)]
    return {"models": models, "merge_method": method, "base_model": "base", "parameters": shared, "dtype": "float32"}


def _slices(method: str, *slices: list[tuple[str, int, int]], **more: Any) -> dict[str, Any]:
    made = [
        {"sources": [{"model": name, "layer_range": [start, stop]} for name, start, stop in part]} for part in slices
    ]
    return {"slices": made, "merge_method": method, "dtype": "float32", **more}


def _three(start: int, stop: int, shared: dict[str, Any], *own: dict[str, Any]) -> dict[str, Any]:
    """A slice of a base and two others."""
    sources = [{"model": name, "layer_range": [start, stop]} for name in ("base", "a", "b")]
    for source, numbers in zip(sources[1:], own, strict=False):
        source["parameters"] = numbers
    return {"sources": sources, "parameters": shared}


CASES: dict[str, dict[str, Any]] = {
    "linear": {
        "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.9}}],
        "merge_method": "linear",
        "dtype": "float32",
    },
    "linear_sum": {
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": -0.25}},
            {"model": "base", "parameters": {"weight": [0.1, 0.4]}},
        ],
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "dtype": "float32",
    },
    "task_arithmetic": _over_base("task_arithmetic", [{"weight": 0.8}, {"weight": -0.3}]),
    "task_arithmetic_lambda": _over_base(
        "task_arithmetic", [{"weight": 0.8}, {"weight": 0.4}], **{"lambda": 0.5, "normalize": True}
    ),
    "ties": _over_base("ties", [{"weight": 0.7, "density": 0.3}, {"weight": 1.1, "density": 0.6}]),
    "ties_rescaled": _over_base(
        "ties",
        [{"weight": [1, 0.2, 0.5], "density": [0.2, 0.9]}, {"weight": -0.6}],
        density=0.5,
        normalize=False,
        rescale=True,
        int8_mask=True,
    ),
    "ties_of_slices": {
        "slices": [
            _three(0, 1, {"weight": [0.4, 0.8]}, {"weight": [{"filter": "mlp", "value": [0.3, 0.6]}]}),
            _three(1, 3, {"density": 0.4, "weight": 1.5}, {"weight": 0.7}),
            _three(3, 4, {"weight": [{"filter": "lm_head", "value": 0.2}, {"filter": "*", "value": 0.9}]}),
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"density": 0.7, "weight": 5.0, "normalize": False},
        "dtype": "float32",
    },
    "switches_along_layers": _over_base(
        "ties", [{"weight": 0.5}, {"weight": 0.8}], density=0.6, normalize=[True, False], rescale=[False, False, True]
    ),
    "base_among_models": {
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("a", 0.5), ("base", 3.0), ("b", 2.0))
        ],
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"normalize": True},
        "dtype": "float32",
    },
    "dare_whole": _over_base("dare_ties", [{"weight": 0.5}, {"weight": 0.4}], density=1.0),
    "slerp": _slices("slerp", [("a", 0, 4), ("b", 0, 4)], base_model="a", parameters={"t": _GRADIENT}),
    "slerp_from_second": {
        "models": [{"model": "a"}, {"model": "b"}],
        "merge_method": "slerp",
        "base_model": "b",
        "parameters": {"t": 0.25},
        "dtype": "float32",
    },
    "passthrough": _slices(
        "passthrough",
        [("a", 0, 3)],
        [("b", 1, 4)],
        parameters={"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]},
    ),
}


def _model(seed: int, folder: Path, base: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if base is not None:
        for weight, other in zip(model.parameters(), base.parameters(), strict=True):
            weight.data.mul_(2).add_(other.data)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return model


def main(folder: Path) -> None:
    """Write everything into a folder that does not exist."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    base = _model(0, Path("base"))
    for seed, name in enumerate("ab", 1):
        _model(seed, Path(name), base)
    for name, recipe in CASES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        with tempfile.TemporaryDirectory() as out:
            run_merge(
                MergeConfiguration.model_validate(recipe),
                out,
                MergeOptions(copy_tokenizer=False, write_model_card=False),
            )
            (written,) = Path(out).glob("*.safetensors")
            shutil.copy(written, f"{name}.safetensors")
            if "slices" in recipe:
                shutil.copy(Path(out) / "config.json", f"{name}.config.json")
    packages = {package: version(package) for package in ("mergekit", "torch", "transformers", "safetensors")}
    Path("versions.json").write_text(json.dumps(packages, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
