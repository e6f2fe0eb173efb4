"""How quantized weights are stored beside the others, and what a configuration says of it.

=====================  =========================================================================================
form                   read by
=====================  =========================================================================================
``compressed-tensors`` vLLM, SGLang, transformers; written as compressed-tensors 0.20 does
``modelopt``           vLLM, SGLang, TensorRT-LLM; as NVIDIA ModelOpt 0.40's unified export does
``fp8``                vLLM, SGLang, transformers; as DeepSeek-V3's weights are
``mxfp4``              transformers, vLLM, SGLang; as GPT-OSS's experts are
``trtllm``             TensorRT-LLM: see ``engines``; the others are of Hugging Face folders
=====================  =========================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.dtypes import DType
from anyckpt.errors import UsageError, did_you_mean
from anyckpt.quantization.choosing import choose_experts
from anyckpt.quantization.engines import TRTLLM
from anyckpt.quantization.quantizing import Options
from anyckpt.quantization.stored import Facts, Layout, Request
from anyckpt.tensor import LazyTensor

_PRODUCER = {"name": "modelopt", "version": "0.40.0"}
"""Whose layout it is: vLLM 0.11 takes a folder for ModelOpt's by this name only."""
GPT = ("gpt", "gptnext")
"""NeMo's words for decoders whose activations it treats otherwise."""
MODELOPT_FILE = "hf_quant_config.json"
"""What ModelOpt writes beside ``config.json``."""


def layout_of(request: Request) -> Layout:
    """The layout that is asked for.

    Raises:
        UsageError: there is no such algorithm or form, or the form has not this algorithm.
    """
    if request.algorithm not in ALGORITHMS:
        raise UsageError(
            "unknown algorithm of quantization",
            expected=", ".join(ALGORITHMS),
            found=request.algorithm,
            remedy=did_you_mean(request.algorithm, dict.fromkeys(ALGORITHMS, "")),
        )
    form = request.form or usual_form(request.algorithm)
    if form not in FORMS:
        raise UsageError(
            "unknown form of quantized weights",
            expected=", ".join(FORMS),
            found=form,
            remedy=did_you_mean(form, dict.fromkeys(FORMS, "")),
        )
    if request.algorithm not in FORMS[form]:
        raise UsageError(
            f"{form} has no {request.algorithm}",
            expected=", ".join(FORMS[form]),
            found=request.algorithm,
            remedy=f"choose another form with --quantize-form: {', '.join(forms_with(request.algorithm))}",
        )
    layout = FORMS[form][request.algorithm]
    if form == "compressed-tensors" and request.algorithm == "fp8" and request.knows_activations:
        layout = replace(layout, static="input_scale")
    _check_calibrated(request, layout, form)
    if request.knows_activations:
        given = [request.activation_scale, *(request.activation_scales or {}).values()]
        wrong = next((scale for scale in given if scale is not None and not 0 < scale < float("inf")), None)
        if wrong is not None:
            raise UsageError("a scale of activations must be a positive number", found=wrong)
        if not layout.static and request.scales_given:
            raise UsageError(
                f"{form} stores no scales of activations for {request.algorithm}",
                found="--activation-scale",
                remedy="leave it out: they are scaled when the model runs, or not quantized",
            )
    elif layout.static_needed:
        raise UsageError(
            f"{request.algorithm} in the form {form} has a scale of activations, which only activations tell",
            remedy=f"give it with --activation-scale (their largest magnitude over 127), or choose {layout.instead}",
        )
    return layout


def _check_calibrated(request: Request, layout: Layout, form: str) -> None:
    """Raise UsageError where statistics are needed and not given, or mean nothing, or have not what is needed."""
    statistics = request.statistics
    if statistics is None:
        if layout.smoothing:
            raise UsageError(
                f"{request.algorithm} depends on activations, and none have been seen",
                expected="statistics of calibration",
                remedy="run anyckpt quantize with a text to calibrate with, or give what it saved with --stats",
            )
        return
    if request.scales_given:
        raise UsageError(
            "scales of activations are given twice",
            found="--stats with --activation-scale or --activation-scales",
            remedy="leave one of them out",
        )
    if not (layout.static or layout.smoothing):
        known = {one: FORMS[one].get(request.algorithm) for one in FORMS}
        others = [one for one, other in known.items() if other is not None and (other.static or other.smoothing)]
        raise UsageError(
            f"{request.algorithm} in the form {form} has nothing that activations decide",
            found="calibration",
            remedy="leave out --stats, or choose "
            + (" or ".join(f"--quantize-form {one}" for one in others) or "fp8, int8_sq, int4_awq, w4a8_awq or nvfp4"),
        )
    if layout.smoothing == "awq" and statistics.group_size != request.group_size:
        found = statistics.group_size
        raise UsageError(
            "the statistics have nothing of AWQ's search for groups of this size",
            expected=f"--group-size {found}" if found else "statistics made for int4_awq or w4a8_awq",
            found=request.group_size if found else "statistics without the search",
            remedy="calibrate for this algorithm and group size",
        )
    if request.cache_kind == "INT8" and form != "trtllm":
        raise UsageError(
            f"{form} keeps no keys and values in 8-bit integers",
            remedy="leave out --enable-kv-cache, or write --to trtllm",
        )


def with_usual_cache(request: Request) -> Request:
    """The request with what NeMo 1 decides about keys and values where nothing is said.

    From ``Quantizer`` of NeMo 2.0: 8 bits, but not for INT8 weights, nor for the decoders that it calls ``gpt``; nor,
    of course, where the form or the model has none.
    """
    statistics = request.statistics
    if request.cache is not None or statistics is None:
        return request
    layout = FORMS.get(request.form or usual_form(request.algorithm), {}).get(request.algorithm)
    usual = "int8" not in request.algorithm and request.decoder not in GPT
    return replace(request, cache=usual and bool(statistics.caches) and layout is not None and bool(layout.caches))


def usual_form(algorithm: str) -> str:
    """The form in which an algorithm's weights are most often found."""
    return _USUAL.get(algorithm, "compressed-tensors")


def forms_with(algorithm: str) -> list[str]:
    """The forms that have an algorithm."""
    return [form for form, layouts in FORMS.items() if algorithm in layouts]


def _compressed(
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
_PLAIN = {"weight": "weight", "scale": "weight_scale"}


def _own_type(request: Request, kind: DType) -> Options:
    """Scales of the weight's element type, as compressed-tensors has them."""
    return Options(request.group_size, wider=True, scale_type=kind)


def _words(request: Request, kind: DType) -> Options:
    return replace(_own_type(request, kind), packed_words=True)


def _column(scale: LazyTensor) -> tuple[int, ...]:
    return (*scale.shape, 1)


# What transformers 5.24 reads of experts is what its ``CompressedTensorsDequantize`` takes apart; vLLM has more.
_COMPRESSED_TENSORS = {
    "fp8": Layout("fp8", _PLAIN, _compressed("float-quantized", {"strategy": "tensor"}, _TOKENS)),
    "fp8_per_channel": Layout(
        "fp8_per_channel",
        _PLAIN,
        _compressed("float-quantized", {"strategy": "channel"}, _TOKENS),
        _own_type,
        {"scale": _column},
    ),
    "fp8_blocks": Layout(
        "fp8_blocks",
        _PLAIN,
        _compressed(
            "float-quantized",
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        _own_type,
        experts_unread="which refuses blocks with a scale each, and reads those of --quantize-form fp8",
    ),
    "int8": Layout(
        "int8_wo",
        _PLAIN,
        _compressed("int-quantized", {"type": "int", "strategy": "channel"}, {"type": "int", **_TOKENS}),
        _own_type,
        {"scale": _column},
        experts_unread="which refuses integers that are not packed, and reads those of --quantize int8_wo",
    ),
    "int8_wo": Layout(
        "int8_wo", _PACKED, _compressed("pack-quantized", {"type": "int", "strategy": "channel"}), _words
    ),
    "int4": Layout(
        "int4", _PACKED, _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}), _words
    ),
    "nvfp4": Layout(
        "nvfp4",
        {"weight": "weight_packed", "scale": "weight_scale", "scale_2": "weight_global_scale"},
        _compressed(
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
        _compressed(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"},
        ),
    ),
}


def _modelopt(name: str, group: Mapping[str, Any] | None = None) -> Callable[[Request, Sequence[str]], Facts]:
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


def _modelopt_file(facts: Facts, request: Request) -> str:
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
_MODELOPT_CACHES = {"k_proj.k_scale": "k", "v_proj.v_scale": "v"}

_MODELOPT = {
    "fp8": Layout(
        "fp8",
        _PLAIN,
        _modelopt("FP8", _EIGHT_BIT_FLOATS),
        lambda request, kind: Options(rounded=None if kind == "float32" else kind),
        {"scale": _single},
        static="input_scale",
        static_shape=(),
        caches=_MODELOPT_CACHES,
        cache_shape=(),
        file=_modelopt_file,
    ),
    "fp8_per_channel": Layout("fp8_per_channel", _PLAIN, _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), file=_modelopt_file),
    "fp8_blocks": Layout(
        "fp8_blocks", _PLAIN, _modelopt("fp8_pb_wo"), shapes={"scale": _four_axes}, file=_modelopt_file
    ),
    "int8_wo": Layout("int8_wo", _PLAIN, _modelopt("W8A16"), file=_modelopt_file),
    "int8_sq": Layout(
        "int8_wo",
        _PLAIN,
        _modelopt("W8A8_SQ_PER_CHANNEL"),
        _smoothed,
        static="input_scale",
        static_shape=(),
        inputs="pre_quant_scale",
        smoothing="smoothquant",
        over=127,
        unrounded=True,
        file=_modelopt_file,
    ),
    "int4_awq": Layout(
        "int4",
        _PLAIN,
        _modelopt("W4A16_AWQ"),
        _smoothed,
        inputs="pre_quant_scale",
        smoothing="awq",
        folded=True,
        unrounded=True,
        caches=_MODELOPT_CACHES,
        cache_shape=(),
        file=_modelopt_file,
    ),
    "w4a8_awq": Layout(
        "int4",
        _PLAIN,
        _modelopt("W4A8_AWQ"),
        _smoothed,
        static="input_scale",
        static_shape=(),
        inputs="pre_quant_scale",
        smoothing="awq",
        second="weight_scale_2",
        folded=True,
        siblings=True,
        unrounded=True,
        caches=_MODELOPT_CACHES,
        cache_shape=(),
        file=_modelopt_file,
    ),
    "nvfp4": Layout(
        "nvfp4",
        {**_PLAIN, "scale_2": "weight_scale_2"},
        _modelopt("NVFP4", {"num_bits": 4, "type": "float", "group_size": 16}),
        static="input_scale",
        static_shape=(),
        siblings=True,
        over=6 * 448.0,
        caches=_MODELOPT_CACHES,
        cache_shape=(),
        file=_modelopt_file,
    ),
}


def _deepseek(request: Request, spared: Sequence[str]) -> Facts:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(spared),
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def _gpt_oss(request: Request, spared: Sequence[str]) -> Facts:
    return {"modules_to_not_convert": list(spared), "quant_method": "mxfp4"}


def _block_axis(tensor: LazyTensor) -> tuple[int, ...]:
    """The bytes of a block are an axis of their own."""
    return (*tensor.shape[:-1], tensor.shape[-1] // 16, 16)


FORMS: Mapping[str, Mapping[str, Layout]] = {
    "compressed-tensors": _COMPRESSED_TENSORS,
    "modelopt": _MODELOPT,
    "fp8": {"fp8_blocks": Layout("fp8_blocks", {"weight": "weight", "scale": "weight_scale_inv"}, _deepseek)},
    "mxfp4": {
        "mxfp4": Layout(
            "mxfp4",
            {"weight": "_blocks", "scale": "_scales"},
            _gpt_oss,
            shapes={"weight": _block_axis},
            experts=True,
            choose=choose_experts,
        )
    },
    "trtllm": TRTLLM,
}
"""Form -> algorithm -> how it is stored."""
_USUAL = {"fp8_blocks": "fp8"} | dict.fromkeys(("int8_sq", "int4_awq", "w4a8_awq"), "modelopt")
ALGORITHMS = tuple(dict.fromkeys(name for layouts in FORMS.values() for name in layouts))
"""What may be asked for; ``int8`` has activations in 8 bits, too, when the model runs, and ``int8_wo`` has not."""
