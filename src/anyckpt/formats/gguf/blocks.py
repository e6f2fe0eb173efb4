"""Blocks of 32 numbers in codes of 4, 5 or 8 bits, with a scale and perhaps a least number, to and from float32.

The arithmetic is that of ggml's reference functions, as the package ``gguf`` has them in numpy, down to the rounding:
bytes and numbers are the same.  What else there is (K-quants, IQ, TQ, MXFP4) that package decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from anyckpt.errors import MissingLibraryError
from anyckpt.indexing import Array
from anyckpt.storage.gather import scratch

SIZE = 32
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""Added before cutting off, it rounds halves away from zero, and what is less than a half to zero."""

_SIGN = np.uint32(0x80000000)


def decode(name: str, blocks: Array) -> Array:
    """Numbers of blocks.

    Args:
        name: of the type.
        blocks: uint8 ``[n, bytes of a block]``, contiguous.

    Returns:
        float32 ``[n, elements of a block]``.

    Raises:
        MissingLibraryError: the type is one that ``gguf`` decodes, and it is not installed or does not know it.
    """
    own = _DECODERS.get(name)
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be infinite
        if own is not None:
            return own(blocks)
        quants, kinds = _library(name)
        numbers: Array = quants.dequantize(blocks, kinds[name])
        return numbers


def check_decodes(name: str) -> None:
    """Raise unless blocks of a type can be decoded here.

    Raises:
        MissingLibraryError: as for ``decode``.
    """
    if name not in _DECODERS:
        _library(name)


def _library(name: str) -> tuple[Any, Any]:
    try:
        quants = import_module("gguf.quants")
        kinds = import_module("gguf.constants").GGMLQuantizationType
        _ = kinds[name]
    except (ImportError, KeyError) as error:
        raise MissingLibraryError(
            f"numbers of type {name} need the package gguf: {error}", remedy="pip install 'anyckpt[gguf]'"
        ) from error
    return quants, kinds


def encode(name: str, numbers: Array) -> Array:
    """Blocks of numbers.

    Args:
        name: of the type, one of ``ENCODERS``.
        numbers: float32 ``[n, 32]``, contiguous.

    Returns:
        uint8 ``[n, bytes of a block]``.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return ENCODERS[name](numbers)


def _halves(blocks: Array, count: int) -> list[Array]:
    """The first ``count`` numbers of each block, float16 there."""
    return [
        np.ascontiguousarray(blocks[:, 2 * at : 2 * at + 2]).view(np.float16).astype(np.float32) for at in range(count)
    ]


def _nibbles(codes: Array) -> Array:
    """32 codes of 4 bits: the low halves of 16 bytes, then the high ones."""
    return np.concatenate([codes & 15, codes >> 4], axis=1)


def _fifth_bits(words: Array) -> Array:
    """The fifth bit of 32 codes, in its place."""
    return np.unpackbits(np.ascontiguousarray(words), axis=1, bitorder="little") << 4


def _decode_q8_0(blocks: Array) -> Array:
    numbers: Array = blocks[:, 2:].view(np.int8).astype(np.float32)
    numbers *= _halves(blocks, 1)[0]
    return numbers


def _decode_q4_0(blocks: Array) -> Array:
    codes = _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)
    numbers: Array = _halves(blocks, 1)[0] * codes.astype(np.float32)
    return numbers


def _decode_q4_1(blocks: Array) -> Array:
    scale, least = _halves(blocks, 2)
    numbers: Array = scale * _nibbles(blocks[:, 4:]).astype(np.float32) + least
    return numbers


def _decode_q5_0(blocks: Array) -> Array:
    codes = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).view(np.int8) - np.int8(16)
    numbers: Array = _halves(blocks, 1)[0] * codes.astype(np.float32)
    return numbers


def _decode_q5_1(blocks: Array) -> Array:
    scale, least = _halves(blocks, 2)
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    numbers: Array = scale * codes.astype(np.float32) + least
    return numbers


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
}


def _largest(numbers: Array, choose: np.ufunc) -> Array:
    """The largest (smallest) number of each block, ``[n, 1]``: halves against halves, which numpy does at once."""
    with scratch(numbers.nbytes // 2) as buffer:
        left: Array = choose(numbers[:, :16], numbers[:, 16:], out=buffer.view(np.float32).reshape(-1, 16))
        while left.shape[1] > 1:
            half = left.shape[1] // 2
            left = choose(left[:, :half], left[:, half:])
        return left


def _inverse(scale: Array) -> Array:
    inverse: Array = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse


def _put(*fields: Array) -> Array:
    return np.concatenate([field.view(np.uint8) for field in fields], axis=1)


def _encode_q8_0(numbers: Array) -> Array:
    blocks = np.empty((len(numbers), 34), np.uint8)
    with scratch(numbers.nbytes) as one, scratch(numbers.nbytes) as other:
        scaled, work = (buffer.view(np.float32).reshape(numbers.shape) for buffer in (one, other))
        np.abs(numbers, out=work)
        scale = _largest(work, np.maximum) / np.float32(127)
        np.multiply(numbers, _inverse(scale), out=scaled)
        halves = work.view(np.uint32)  # half of each number's sign: copysign takes ten times as long
        np.bitwise_and(scaled.view(np.uint32), _SIGN, out=halves)
        np.bitwise_or(halves, _BELOW_HALF.view(np.uint32), out=halves)
        np.add(scaled, work, out=scaled)
        blocks[:, :2] = scale.astype(np.float16).view(np.uint8)
        codes = work.view(np.int8)[:, :32]
        np.copyto(codes, scaled, casting="unsafe")
        blocks[:, 2:] = codes.view(np.uint8)
    return blocks


def _signed(numbers: Array, half: int) -> tuple[Array, Array]:
    """Codes around ``half``, and the scale, by which the number furthest from zero is the lowest code."""
    furthest = np.take_along_axis(numbers, np.abs(numbers).argmax(axis=1, keepdims=True), axis=1)
    scale = furthest / np.float32(-half)
    codes = np.trunc(numbers * _inverse(scale) + np.float32(half + 0.5)).astype(np.uint8)
    return codes.clip(0, 2 * half - 1), scale.astype(np.float16)


def _unsigned(numbers: Array, most: int) -> tuple[Array, Array, Array]:
    """Codes from the least number on, the scale, and that number."""
    least = _largest(numbers, np.minimum)
    scale = (_largest(numbers, np.maximum) - least) / np.float32(most)
    codes = np.trunc((numbers - least) * _inverse(scale) + np.float32(0.5)).astype(np.uint8)
    return codes.clip(0, most), scale.astype(np.float16), least.astype(np.float16)


def _packed(codes: Array) -> Array:
    packed: Array = (codes[:, :16] & 15) | (codes[:, 16:] << 4)
    return packed


def _packed_fifth(codes: Array) -> Array:
    packed: Array = np.packbits(codes >> 4, axis=1, bitorder="little")
    return packed


def _encode_q4_0(numbers: Array) -> Array:
    codes, scale = _signed(numbers, 8)
    return _put(scale, _packed(codes))


def _encode_q5_0(numbers: Array) -> Array:
    codes, scale = _signed(numbers, 16)
    return _put(scale, _packed_fifth(codes), _packed(codes))


def _encode_q4_1(numbers: Array) -> Array:
    codes, scale, least = _unsigned(numbers, 15)
    return _put(scale, least, _packed(codes))


def _encode_q5_1(numbers: Array) -> Array:
    codes, scale, least = _unsigned(numbers, 31)
    return _put(scale, least, _packed_fifth(codes), _packed(codes))


ENCODERS: dict[str, Callable[[Array], Array]] = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
}
"""Type -> what makes blocks of it."""
