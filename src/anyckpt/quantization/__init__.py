"""Quantized weights: narrow number formats, the scales beside them, and what they stand for."""

from anyckpt.quantization.methods import METHODS, method_of
from anyckpt.quantization.weights import Dequantized, dequantize, refusal

__all__ = ["METHODS", "Dequantized", "dequantize", "method_of", "refusal"]
