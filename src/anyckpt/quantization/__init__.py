"""Quantized weights: narrow number formats, the scales beside them, and what they stand for."""

from anyckpt.quantization.methods import METHODS, is_understood, method_of
from anyckpt.quantization.quantizing import ALGORITHMS, Options, quantized
from anyckpt.quantization.scales import scales_checked
from anyckpt.quantization.weights import Dequantized, dequantize, refusal

__all__ = [
    "ALGORITHMS",
    "METHODS",
    "Dequantized",
    "Options",
    "dequantize",
    "is_understood",
    "method_of",
    "quantized",
    "refusal",
    "scales_checked",
]
