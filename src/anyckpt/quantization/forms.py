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

from collections.abc import Mapping, Sequence
from dataclasses import replace

from anyckpt.errors import UsageError, did_you_mean
from anyckpt.quantization.choosing import choose_experts
from anyckpt.quantization.compressed_tensors import COMPRESSED_TENSORS
from anyckpt.quantization.engines import TRTLLM
from anyckpt.quantization.modelopt import MODELOPT
from anyckpt.quantization.stored import Facts, Layout, Request
from anyckpt.tensor import LazyTensor

GPT = ("gpt", "gptnext")
"""NeMo's words for decoders whose activations it treats otherwise."""


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
            remedy=f"choose another form with --quantize-form: {', '.join(layouts_of(request.algorithm))}",
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
    if not layout.sees_activations:
        others = [one for one, other in layouts_of(request.algorithm).items() if other.sees_activations]
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


def layouts_of(algorithm: str) -> dict[str, Layout]:
    """How each form that has an algorithm stores it."""
    return {form: layouts[algorithm] for form, layouts in FORMS.items() if algorithm in layouts}


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
    "compressed-tensors": COMPRESSED_TENSORS,
    "modelopt": MODELOPT,
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
_USUAL = {"fp8_blocks": "fp8"} | {name: "modelopt" for name, layout in MODELOPT.items() if layout.smoothing}
ALGORITHMS = tuple(dict.fromkeys(name for layouts in FORMS.values() for name in layouts))
"""What may be asked for; ``int8`` has activations in 8 bits, too, when the model runs, and ``int8_wo`` has not."""
