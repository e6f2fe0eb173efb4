"""How quantized weights are stored as NVIDIA ModelOpt 0.40's unified export does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.dtypes import DType
from anyckpt.quantization.quantizing import Options
from anyckpt.quantization.stored import PLAIN, Facts, Layout, Request
from anyckpt.tensor import LazyTensor

MODELOPT_FILE = "hf_quant_config.json"
"""What ModelOpt writes beside ``config.json``."""
_PRODUCER = {"name": "modelopt", "version": "0.40.0"}
"""Whose layout it is: vLLM 0.11 takes a folder for ModelOpt's by this name only."""


def _facts(name: str, group: Mapping[str, Any] | None = None) -> Callable[[Request, Sequence[str]], Facts]:
    """Facts that ModelOpt puts into ``config.json``."""

    def facts(request: Request, spared: Sequence[str]) -> Facts:
        stated: Facts = {}
        if group is not None:
            each = {"dynamic": False, **group}
            stated["config_groups"] = {"group_0": {"input_activations": each, "weights": each, "targets": ["Linear"]}}
        kept = {} if request.cache_kind is None else {"kv_cache_scheme": {"dynamic": False, **_EIGHT_BIT_FLOATS}}
        return {
            **stated,
            "ignore": list(spared),
            "quant_algo": name,
            **kept,
            "producer": _PRODUCER,
            "quant_method": "modelopt",
        }

    return facts


def _file_beside(facts: Facts, request: Request) -> str:
    stated: Facts = {"quant_algo": facts["quant_algo"], "kv_cache_quant_algo": request.cache_kind}
    if request.algorithm == "nvfp4":
        stated["group_size"] = 16
    if request.algorithm in _AWQ:
        stated |= {"group_size": request.group_size, "has_zero_point": False, "pre_quant_scale": True}
    document = {"producer": _PRODUCER, "quantization": {**stated, "exclude_modules": facts["ignore"]}}
    return json.dumps(document, indent=4)


def _smoothed(request: Request, kind: DType) -> Options:
    return Options(request.group_size, first=kind, unsigned=True)


def _single(scale: LazyTensor) -> tuple[int, ...]:
    return ()


def _four_axes(scale: LazyTensor) -> tuple[int, ...]:
    """As ModelOpt writes blocks: none where there is one block in all."""
    return () if scale.size == 1 else (scale.shape[0], 1, scale.shape[1], 1)


_AWQ = ("int4_awq", "w4a8_awq")
_EIGHT_BIT_FLOATS = {"num_bits": 8, "type": "float"}
_CACHES = {"k_proj.k_scale": "k", "v_proj.v_scale": "v"}

MODELOPT = {
    "fp8": Layout(
        "fp8",
        PLAIN,
        _facts("FP8", _EIGHT_BIT_FLOATS),
        lambda request, kind: Options(rounded=None if kind == "float32" else kind),
        {"scale": _single},
        static="input_scale",
        static_shape=(),
        caches=_CACHES,
        cache_shape=(),
        file=_file_beside,
    ),
    "fp8_per_channel": Layout("fp8_per_channel", PLAIN, _facts("FP8_PER_CHANNEL_PER_TOKEN"), file=_file_beside),
    "fp8_blocks": Layout("fp8_blocks", PLAIN, _facts("fp8_pb_wo"), shapes={"scale": _four_axes}, file=_file_beside),
    "int8_wo": Layout("int8_wo", PLAIN, _facts("W8A16"), file=_file_beside),
    "int8_sq": Layout(
        "int8_wo",
        PLAIN,
        _facts("W8A8_SQ_PER_CHANNEL"),
        _smoothed,
        static="input_scale",
        static_shape=(),
        inputs="pre_quant_scale",
        smoothing="smoothquant",
        over=127,
        unrounded=True,
        file=_file_beside,
    ),
    "int4_awq": Layout(
        "int4",
        PLAIN,
        _facts("W4A16_AWQ"),
        _smoothed,
        inputs="pre_quant_scale",
        smoothing="awq",
        folded=True,
        unrounded=True,
        caches=_CACHES,
        cache_shape=(),
        file=_file_beside,
    ),
    "w4a8_awq": Layout(
        "int4",
        PLAIN,
        _facts("W4A8_AWQ"),
        _smoothed,
        static="input_scale",
        static_shape=(),
        inputs="pre_quant_scale",
        smoothing="awq",
        second="weight_scale_2",
        folded=True,
        siblings=True,
        unrounded=True,
        caches=_CACHES,
        cache_shape=(),
        file=_file_beside,
    ),
    "nvfp4": Layout(
        "nvfp4",
        {**PLAIN, "scale_2": "weight_scale_2"},
        _facts("NVFP4", {"num_bits": 4, "type": "float", "group_size": 16}),
        static="input_scale",
        static_shape=(),
        siblings=True,
        over=6 * 448.0,
        caches=_CACHES,
        cache_shape=(),
        file=_file_beside,
    ),
}
