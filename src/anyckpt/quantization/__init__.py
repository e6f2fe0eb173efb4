"""Quantized weights: narrow number formats, the scales beside them, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand

if TYPE_CHECKING:
    from anyckpt.quantization.methods import METHODS, is_understood, method_of
    from anyckpt.quantization.scales import scales_checked
    from anyckpt.quantization.weights import dequantize, refusal

__all__ = [
    "METHODS",
    "dequantize",
    "is_understood",
    "method_of",
    "refusal",
    "scales_checked",
]

__getattr__, __dir__ = on_demand(
    __name__,
    {
        **dict.fromkeys(("METHODS", "is_understood", "method_of"), "quantization.methods"),
        "scales_checked": "quantization.scales",
        **dict.fromkeys(("dequantize", "refusal"), "quantization.weights"),
    },
)
