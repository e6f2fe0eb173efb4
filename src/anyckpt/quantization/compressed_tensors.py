"""How quantized weights are stored as compressed-tensors 0.20 does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.dtypes import DType
from anyckpt.quantization.quantizing import Options
from anyckpt.quantization.stored import PLAIN, Facts, Layout, Request
from anyckpt.tensor import LazyTensor


def _facts(
    name: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None
) -> Callable[[Request, Sequence[str]], Facts]:
    """Facts of a format of compressed-tensors."""

    def facts(request: Request, spared: Sequence[str]) -> Facts:
        inputs = None if activations is None else {**_NUMBERS, **activations}
        if request.knows_activations and inputs is not None:
            inputs = {**inputs, "strategy": "tensor", "dynamic": False}
        stated = {**_NUMBERS, **weights}
        if stated.get("strategy") == "group" and request.algorithm == "int4":
            stated["group_size"] = request.group_size
        group = {
            "targets": ["Linear"],
            "weights": stated,
            "input_activations": inputs,
            "output_activations": None,
            "format": name,
        }
        return {
            "config_groups": {"group_0": group},
            "format": name,
            "global_compression_ratio": None,
            "ignore": list(spared),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    return facts


_NUMBERS = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
_TOKENS = {"strategy": "token", "dynamic": True}
_PACKED = {"weight": "weight_packed", "scale": "weight_scale", "shape": "weight_shape"}


def _own_type(request: Request, kind: DType) -> Options:
    """Scales of the weight's element type, as compressed-tensors has them."""
    return Options(request.group_size, wider=True, scale_type=kind)


def _words(request: Request, kind: DType) -> Options:
    return replace(_own_type(request, kind), packed_words=True)


def _column(scale: LazyTensor) -> tuple[int, ...]:
    return (*scale.shape, 1)


# What transformers 5.24 reads of experts is what its ``CompressedTensorsDequantize`` takes apart; vLLM has more.
COMPRESSED_TENSORS = {
    "fp8": Layout("fp8", PLAIN, _facts("float-quantized", {"strategy": "tensor"}, _TOKENS)),
    "fp8_per_channel": Layout(
        "fp8_per_channel",
        PLAIN,
        _facts("float-quantized", {"strategy": "channel"}, _TOKENS),
        _own_type,
        {"scale": _column},
    ),
    "fp8_blocks": Layout(
        "fp8_blocks",
        PLAIN,
        _facts(
            "float-quantized",
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        _own_type,
        experts_unread="which refuses blocks with a scale each, and reads those of --quantize-form fp8",
    ),
    "int8": Layout(
        "int8_wo",
        PLAIN,
        _facts("int-quantized", {"type": "int", "strategy": "channel"}, {"type": "int", **_TOKENS}),
        _own_type,
        {"scale": _column},
        experts_unread="which refuses integers that are not packed, and reads those of --quantize int8_wo",
    ),
    "int8_wo": Layout("int8_wo", _PACKED, _facts("pack-quantized", {"type": "int", "strategy": "channel"}), _words),
    "int4": Layout(
        "int4", _PACKED, _facts("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}), _words
    ),
    "nvfp4": Layout(
        "nvfp4",
        {"weight": "weight_packed", "scale": "weight_scale", "scale_2": "weight_global_scale"},
        _facts(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
        ),
        lambda request, kind: Options(inverted=True),
        siblings=True,
        experts_unread="which leaves out weight_global_scale and so runs another model, and reads those of "
        "--quantize mxfp4",
    ),
    "mxfp4": Layout(
        "mxfp4",
        {"weight": "weight_packed", "scale": "weight_scale"},
        _facts(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"},
        ),
    ),
}
