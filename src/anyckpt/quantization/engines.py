"""How TensorRT-LLM stores quantized weights: as NVIDIA ModelOpt 0.40 writes them.

Weights are those of a layer when it runs: query, key and value in one, so that they have one scale of the whole; the
two halves of a gated layer share theirs, and experts have one each.  Where its loader asks for what inputs are
multiplied by, ones are stored, which ModelOpt leaves out where it saw no activations.  Weight-only weights stay
numbers, as TensorRT-LLM's own ``quantize.py`` has them: an engine is built of integers in an order of its GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from anyckpt.dtypes import DType
from anyckpt.quantization.choosing import ASKED, Choice, is_asked
from anyckpt.quantization.quantizing import Options
from anyckpt.quantization.stored import Facts, Layout, Request
from anyckpt.tensor import LazyTensor

_LINEAR = re.compile(
    r"transformer\.layers\.\d+\.(?:attention\.(?:qkv|dense)|mlp\.(?:shared_expert\.)?(?:fc|gate|proj))\.weight"
)
_BESIDE = {
    "lm_head.weight": "the output layer",
    ".mlp.router.weight": "a router",
    ".mlp.shared_expert_gate.weight": "a gate",
}
_NAMES = {"weight": "weight", "scale": "weights_scaling_factor", "scale_2": "weights_scaling_factor_2"}
_STATIC, _INPUTS = "activation_scaling_factor", "prequant_scaling_factor"
_PER_TOKEN = "--quantize fp8_per_channel"
_CACHES = {f"{what}_cache_scaling_factor": what for what in ("k", "v", "kv")}
_NVFP4_OVER = 6 * 448.0


def _groups(request: Request, kind: DType) -> Options:
    return Options(request.group_size)


def _choose(tensors: Mapping[str, LazyTensor], exclude: Sequence[str]) -> Choice:
    """The matrices of attention and MLP, experts included."""
    weights: list[str] = []
    spared: dict[str, str] = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        reason = next((why for end, why in _BESIDE.items() if name.endswith(end)), None)
        if reason is not None:
            spared[module] = reason
        elif _LINEAR.fullmatch(name):
            if is_asked(name, module, exclude):
                spared[module] = ASKED
            else:
                weights.append(name)
    return Choice(tuple(weights), spared)


def _choose_without_experts(tensors: Mapping[str, LazyTensor], exclude: Sequence[str]) -> Choice:
    """Experts stay as they are: it is not known how TensorRT-LLM has them so."""
    found = _choose(tensors, exclude)
    experts = {name.removesuffix(".weight"): "experts" for name in found.weights if tensors[name].ndim > 2}
    dense = tuple(name for name in found.weights if tensors[name].ndim == 2)
    return Choice(dense, {**found.spared, **experts})


def _facts(algorithm: str) -> Callable[[Request, Sequence[str]], Facts]:
    """What ``config.json`` says, in ModelOpt's order."""

    def facts(request: Request, spared: Sequence[str]) -> Facts:
        stated: Facts = {
            "quant_method": "trtllm",
            "quant_algo": algorithm,
            "kv_cache_quant_algo": request.cache_kind,
        }
        if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
            stated |= {"group_size": request.group_size, "has_zero_point": False, "pre_quant_scale": True}
        if algorithm == "NVFP4":
            stated["group_size"] = 16
        return {**stated, "exclude_modules": list(spared)}

    return facts


_layout = partial(Layout, choose=_choose, unrounded=True, key="")

TRTLLM = {
    "fp8": _layout(
        "fp8",
        _NAMES,
        _facts("FP8"),
        static=_STATIC,
        instead=_PER_TOKEN,
        siblings=True,
        apart=True,
        caches=_CACHES,
    ),
    "fp8_per_channel": _layout(
        "fp8_per_channel",
        {**_NAMES, "scale": "per_channel_scale"},
        _facts("FP8_PER_CHANNEL_PER_TOKEN"),
    ),
    "int8": _layout(
        "int8_wo",
        _NAMES,
        _facts("W8A8_SQ_PER_CHANNEL"),
        static=_STATIC,
        static_needed=True,
        instead=_PER_TOKEN,
        inputs=_INPUTS,
        over=127,
        caches=_CACHES,
    ),
    "int8_sq": _layout(
        "int8_wo",
        _NAMES,
        _facts("W8A8_SQ_PER_CHANNEL"),
        static=_STATIC,
        inputs=_INPUTS,
        smoothing="smoothquant",
        over=127,
        choose=_choose_without_experts,
        caches=_CACHES,
    ),
    "int8_wo": _layout("", {}, _facts("W8A16"), unrounded=False),
    "int4_wo": _layout("", {}, _facts("W4A16"), unrounded=False),
    "int4": _layout(
        "int4",
        _NAMES,
        _facts("W4A16_AWQ"),
        _groups,
        inputs=_INPUTS,
    ),
    "int4_awq": _layout(
        "int4",
        _NAMES,
        _facts("W4A16_AWQ"),
        _groups,
        inputs=_INPUTS,
        smoothing="awq",
        caches=_CACHES,
    ),
    "w4a8_awq": _layout(
        "int4",
        _NAMES,
        _facts("W4A8_AWQ"),
        _groups,
        static=_STATIC,
        inputs=_INPUTS,
        smoothing="awq",
        second=_NAMES["scale_2"],
        choose=_choose_without_experts,
        caches=_CACHES,
    ),
    "nvfp4": _layout(
        "nvfp4",
        _NAMES,
        _facts("NVFP4"),
        static=_STATIC,
        static_shape=(),
        instead=_PER_TOKEN,
        siblings=True,
        apart=True,
        over=_NVFP4_OVER,
        caches=_CACHES,
    ),
}
"""Algorithm -> how it is stored."""
