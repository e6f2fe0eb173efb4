"""Quantized weights: narrow number formats, the scales beside them, and what they stand for."""

from anyckpt.quantization.methods import METHODS, is_understood, method_of
from anyckpt.quantization.weights import Dequantized, dequantize, refusal

__all__ = ["METHODS", "Dequantized", "dequantize", "is_understood", "method_of", "refusal"]
