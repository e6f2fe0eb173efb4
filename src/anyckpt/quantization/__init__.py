"""Quantized weights: narrow number formats, the scales beside them, and what they stand for."""

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
