"""What NVIDIA ModelOpt wrote after calibration, and the statistics that it was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import anyckpt
from anyckpt.quantization.statistics import ALPHAS, Seen, Shared, Statistics, digest_of
from anyckpt.tensor import LazyTensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fp8_a", "fp8", {"enable_kv_cache": False}),
    ("fp8_kv8_bf16_b", "fp8", {}),
    ("fp8_moe_c", "fp8", {"enable_kv_cache": False}),
    ("int8_a", "int8", {}),
    ("int8_sq_a", "int8_sq", {}),
    ("int8_sq05_b", "int8_sq", {"sq_alpha": 0.5, "enable_kv_cache": True}),
    ("int4_awq_a", "int4_awq", {"group_size": 32, "enable_kv_cache": False}),
    ("int4_awq_b", "int4_awq", {"enable_kv_cache": False}),
    ("int4_awq_moe_c", "int4_awq", {"group_size": 32, "enable_kv_cache": False}),
    ("int4_awq_bf16_b", "int4_awq", {"enable_kv_cache": False}),
    ("w4a8_awq_b", "w4a8_awq", {"enable_kv_cache": False}),
    ("nvfp4_b", "nvfp4", {"enable_kv_cache": False}),
]
"""Where ModelOpt's tensors are, the algorithm, and options of ``anyckpt.convert`` for the same."""
_NOT_OURS = (("int8_sq05_b", "hf"), ("int8_a", "hf"))
"""Variants of ModelOpt's that have no form of ours: caches in 8-bit integers, INT8 without SmoothQuant."""
_TYPES = {"float16": "fp16", "bfloat16": "bf16"}
_OF_NORMS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), ""),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), ""),
)


def facts_of(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / case / "expected.json").read_text())
    return found


def tensors_of(case: str, variant: str, rank: int | None = None) -> dict[str, dict[str, Any]]:
    """Facts of a variant's tensors; those of one rank, where it has several."""
    found: dict[str, dict[str, Any]] = {}
    for file, facts in facts_of(case)["variants"][variant]["files"].items():
        if file.endswith("safetensors") and rank in (None, int("".join(filter(str.isdigit, file)) or 0)):
            found |= facts["tensors"]
    return found


def exports() -> list[tuple[str, str, dict[str, Any], str]]:
    """Each case with each of its variants."""
    every = [(*case, variant) for case in CASES for variant in facts_of(case[0])["variants"]]
    return [one for one in every if (one[0], one[3]) not in _NOT_OURS]


def export(
    case: str, algorithm: str, options: dict[str, Any], variant: str, statistics: Statistics, out: Path
) -> list[Path]:
    """Write a variant as ModelOpt does: the files of its ranks."""
    facts = facts_of(case)
    arguments: dict[str, Any] = {"to": "hf", "quantize_form": "modelopt"}
    if variant != "hf":
        tp, pp = (int(size[2:]) for size in (variant[-6:-3], variant[-3:]))
        arguments = {"to": "trtllm", "layout": anyckpt.LayoutRequest(tensor_parallel=tp, pipeline_parallel=pp)}
    anyckpt.convert(
        FIXTURES / facts["source"] / "hf",
        out,
        dtype=_TYPES[facts["export_dtype"]],
        quantize=algorithm,
        statistics=statistics,
        **arguments,
        **options,
    )
    return sorted(out.glob("*.safetensors"))


def ones(found: Mapping[str, LazyTensor]) -> set[str]:
    """Factors of inputs that TensorRT-LLM's loader asks for, and ModelOpt leaves out where it smoothed nothing."""
    return {
        name
        for name, tensor in found.items()
        if name.endswith("prequant_scaling_factor") and bool((tensor.numpy() == 1).all())
    }


def sha256(tensor: LazyTensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def statistics_of(case: str) -> Statistics:
    """Statistics such as calibration gives, of ModelOpt's own numbers: for a model of Llama's modules."""
    facts = facts_of(case)
    kind = facts["load_dtype"]
    source = FIXTURES / facts["source"]
    numbers = np.load(source / ("stats.npz" if kind == "float32" else "stats_bf16.npz"))
    weights = anyckpt.open(source / "hf").weights()
    searched = facts.get("awq", {})
    group = 32 if facts["source"] == "src_llama_a" else 128
    modules: dict[str, Seen] = {}
    shared: list[Shared] = []
    for layer in range(sum(name.endswith("o_proj.weight") for name in weights)):
        stem = f"model.layers.{layer}."
        for several, norm in _OF_NORMS:
            shared.append(Shared(tuple(stem + one for one in several), stem + norm if norm else ""))
            for name in shared[-1].modules:
                weight = weights[f"{name}.weight"].numpy().astype(np.float32)
                losses = [searched[name]["loss"][str(alpha)] for alpha in ALPHAS] if searched else None
                mean = numbers[f"{name}|in_absmean_per_channel"].astype(np.float32)
                modules[name] = Seen(
                    inputs=numbers[f"{name}|in_amax_per_channel"].astype(np.float32),
                    columns=np.abs(weight).max(axis=0),
                    tokens=144,
                    losses=None if losses is None else np.array(losses),
                    scales=None if losses is None else _scales(mean, _within(weight, group, kind), losses),
                )
    caches = {
        f"model.layers.{layer}.self_attn": tuple(
            float(numbers[f"model.layers.{layer}.self_attn.{one}_proj|out_amax"]) for one in "kv"
        )
        for layer in range(len(modules) // 7)
    }
    used = {f"{name}.weight": weights[f"{name}.weight"] for name in modules}
    return Statistics(digest_of(used), kind, modules, tuple(shared), caches, group if searched else None)


def _within(weight: np.ndarray[Any, Any], group: int, kind: str) -> np.ndarray[Any, Any]:
    """The mean over rows of magnitudes over the largest of their group, computed in the type of the model."""
    blocks = np.abs(weight).reshape(weight.shape[0], -1, group)
    shares = blocks / blocks.max(axis=2, keepdims=True)
    if kind == "bfloat16":
        shares = shares.astype(ml_dtypes.bfloat16).astype(np.float32)
    mean = shares.reshape(weight.shape).mean(axis=0, dtype=np.float32)
    if kind == "bfloat16":
        mean = mean.astype(ml_dtypes.bfloat16).astype(np.float32)
    return mean


def _scales(mean: np.ndarray[Any, Any], within: np.ndarray[Any, Any], losses: list[float]) -> np.ndarray[Any, Any]:
    alpha = ALPHAS[int(np.argmin(losses))]
    found = np.power(mean, np.float32(alpha)) / np.power(within, np.float32(1 - alpha))
    found = np.clip(found, np.float32(1e-4), np.float32(1e4))
    return found / np.sqrt(found.max() * found.min())
