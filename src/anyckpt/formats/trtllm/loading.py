"""What of quantized weights TensorRT-LLM's loader refuses or misreads, although they are whole.

Facts: TensorRT-LLM's ``Linear`` classes.  For W8A16 and W4A16 they take numbers, which they quantize themselves, or
integers in the order of a GPU's kernels beside ``per_channel_scale``; ModelOpt writes integers row by row beside
``weights_scaling_factor``.  Those of AWQ and SmoothQuant have a ``prequant_scaling_factor`` that must be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.tensor import LazyTensor

_WEIGHT = ".weight"
_SCALE = ".weights_scaling_factor"
_PREQUANT = ".prequant_scaling_factor"
_WEIGHT_ONLY = ("W8A16", "W4A16")
_WITH_PREQUANT = ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL")


def refused(tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any] | None) -> Iterator[str]:
    """What a user should know before building an engine, one line each."""
    algorithm = None if facts is None else facts.get("quant_algo")
    quantized = [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]
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
