"""What of quantized weights TensorRT-LLM's loader refuses or misreads, although they are whole.

Facts: TensorRT-LLM's ``Linear`` classes.  For W8A16 and W4A16 they take numbers, which they quantize themselves, or
integers in the order of a GPU's kernels beside ``per_channel_scale``; ModelOpt writes integers row by row beside
``weights_scaling_factor``.  Those of AWQ and SmoothQuant have a ``prequant_scaling_factor`` that must be there.  Which
layers are quantized is what ``exclude_modules`` leaves, globs of whole names.  Block scales of NVFP4 are unpacked as
two axes (``preprocess_weights`` in release 1.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from anyckpt.tensor import LazyTensor

_WEIGHT = ".weight"
_SCALE = ".weights_scaling_factor"
_PREQUANT = ".prequant_scaling_factor"
_LINEAR = re.compile(
    r"(transformer\.layers\.\d+\.(?:attention\.(?:qkv|dense)|mlp\.(?:shared_expert\.)?(?:fc|gate|proj)))\.weight"
)
_MIXED = "MIXED_PRECISION"
_WEIGHT_ONLY = ("W8A16", "W4A16")
_WITH_PREQUANT = ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL")


def refused(tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any] | None) -> Iterator[str]:
    """What a user should know before building an engine, one line each."""
    algorithm = None if facts is None else facts.get("quant_algo")
    quantized = [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]
    codes = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1 and _LINEAR.fullmatch(name)]
    if facts is None and codes:
        yield (
            f"{len(codes)} weights are 8-bit numbers, {codes[0]} among them, and nothing says how they are quantized: "
            "TensorRT-LLM's loader takes the model's own type; write numbers with --dtype"
        )
    if algorithm in _WEIGHT_ONLY and quantized:
        yield (
            f"TensorRT-LLM cannot load these {algorithm} weights: {len(quantized)} have integers row by row and "
            f"{_SCALE[1:]}, as ModelOpt writes them, and its loader takes float16 weights, or integers in the order of "
            "a GPU's kernels and per_channel_scale; write float16 weights with --dtype fp16 and set quant_algo"
        )
    if algorithm in _WITH_PREQUANT:
        without = [stem for stem in quantized if stem + _PREQUANT not in tensors]
        if without:
            yield (
                f"TensorRT-LLM cannot load these {algorithm} weights: its loader asks for {_PREQUANT[1:]}, which "
                f"{len(without)} of {len(quantized)} quantized weights lack, {without[0]} among them; they were "
                "quantized without looking at activations"
            )
    if algorithm == "NVFP4":
        stacked = [stem for stem in quantized if tensors[stem + _SCALE].ndim > 2]
        if stacked:
            yield (
                f"TensorRT-LLM's loader of checkpoints takes rows and columns of NVFP4's scales, and fails on those of "
                f"{len(stacked)} stacks of experts, {stacked[0]} among them, which ModelOpt writes so: serve a folder "
                "that is written with --to hf --quantize nvfp4 --quantize-form modelopt"
            )
    if algorithm not in (None, _MIXED, *_WEIGHT_ONLY):
        yield from _against_the_list(tensors, facts or {})


def _against_the_list(tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any]) -> Iterator[str]:
    """Layers that are not quantized where the list has it that they are, and the other way round."""
    listed = facts.get("exclude_modules")
    patterns = [pattern for pattern in listed if isinstance(pattern, str)] if isinstance(listed, list) else []
    missing: list[str] = []
    surplus: list[str] = []
    for name, tensor in tensors.items():
        match = _LINEAR.fullmatch(name)
        if match is None:
            continue
        quantized, excluded = tensor.dtype.itemsize == 1, any(fnmatchcase(match[1], each) for each in patterns)
        if quantized == excluded:
            (surplus if quantized else missing).append(match[1])
    if missing:
        yield (
            f"{len(missing)} layers are in full precision and not among exclude_modules, {missing[0]} among them: "
            "TensorRT-LLM's loader asks for their scales"
        )
    if surplus:
        yield (
            f"{len(surplus)} layers are quantized and among exclude_modules, {surplus[0]} among them: TensorRT-LLM's "
            "loader takes their codes for numbers"
        )
