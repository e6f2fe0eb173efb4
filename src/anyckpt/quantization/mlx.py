"""Weights as MLX quantizes them: codes in 32-bit words along the inputs, and scales of groups of them.

From MLX 0.32 (``mlx.core.quantize`` and ``dequantize``) and mlx-lm 0.31 (``quantize_model``), whose ``config.json``
says under ``quantization`` what is quantized how, and in it the same of single modules by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from anyckpt.dtypes import DType, dtype
from anyckpt.quantization.affine import Offset, RunningBits, Unpacked
from anyckpt.quantization.assembled import Assembled, Parts, check_shape, fault
from anyckpt.quantization.nodes import Decode, Halved, Repeated, as_bytes, scaled
from anyckpt.quantization.numbers import table_of
from anyckpt.tensor import LazyTensor, Mapped

METHOD = "mlx"
AFFINE = "affine"
BITS = (1, 2, 3, 4, 5, 6, 8)
_WORD = 32
_FLOAT8, _FLOAT32 = dtype("float8_e4m3fn"), dtype("float32")


class Way(NamedTuple):
    """How a weight is quantized: what codes are, their bits, and how many of them have a scale in common."""

    mode: str
    bits: int
    group: int


USUAL = Way(AFFINE, 4, 64)
FLOATS: Mapping[Way, tuple[str, str]] = {
    Way("mxfp4", 4, 32): ("float4_e2m1", "float8_e8m0fnu"),
    Way("nvfp4", 4, 16): ("float4_e2m1", "float8_e4m3fn"),
    Way("mxfp8", 8, 32): ("float8", "float8_e8m0fnu"),
}
"""Ways in which codes are floats -> what the codes are, and what the scales, which are stored as bytes."""

KNOWN = f"{AFFINE} of {', '.join(map(str, BITS))} bits, {', '.join(way.mode for way in FLOATS)}"


def stored(way: Way, of: Callable[[str], bool]) -> Assembled:
    """How a weight lies in ``weight``, ``scales`` and, of integers, ``biases``.

    Args:
        way: how it is quantized.
        of: whether a module is quantized so.
    """
    affine = way not in FLOATS

    def make(parts: Parts, to: DType) -> LazyTensor:
        words = parts["weight"]
        width = words.shape[-1] * _WORD // way.bits
        if words.ndim < 2 or width % way.group or width * way.bits != words.shape[-1] * _WORD:
            raise fault("weight", f"words of whole groups of {way.group} codes of {way.bits} bits", words.shape)
        shape = (*words.shape[:-1], width // way.group)
        scales = check_shape("scales", parts["scales"], shape)
        block = (*(1 for _ in shape[:-1]), way.group)
        if affine:
            offsets = check_shape("biases", parts["biases"], shape)
            if not scales.dtype.is_floating or offsets.dtype != scales.dtype:
                raise fault("biases", "floats of the scales' type", f"{offsets.dtype.name} and {scales.dtype.name}")
            codes = _codes(words, way.bits)
            spread = [Repeated(tensor, block, codes.shape) for tensor in (scales, offsets)]
            return Mapped((codes, *spread), to, Offset(scales.dtype, to))
        numbers, kind = FLOATS[way]
        if scales.dtype.name != "uint8":
            raise fault("scales", "uint8", scales.dtype.name)
        exact = Mapped((scales,), _FLOAT32, Decode(dtype(kind)))
        return scaled(_codes(words, way.bits), table_of(numbers, _FLOAT8), exact, block, to)

    needed = ("scales", "biases") if affine else ("scales",)
    return Assembled("weight", needed, (), "uint32", make, f"int{way.bits}" if affine else way.mode, of=of)


def _codes(words: LazyTensor, bits: int) -> LazyTensor:
    """The codes of words, one a byte, ``[..., columns]``."""
    separate = as_bytes(words) if bits > 2 else None
    if separate is None:
        if _WORD % bits:
            raise fault("weight", "words that lie together in a file", words.shape)
        return Unpacked(words, words.ndim - 1, bits)
    if bits == 8:
        return separate
    return Halved(separate, separate.ndim - 1) if bits == 4 else RunningBits(separate, bits)
