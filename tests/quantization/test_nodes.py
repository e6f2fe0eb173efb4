"""Codes and scales as lazy tensors, against numpy on whole arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from anyckpt.dtypes import dtype
from anyckpt.quantization.nodes import Halved, Repeated, product, scaled
from anyckpt.quantization.numbers import e2m1, values_of
from anyckpt.tensor import LazyTensor, Mapped, from_array

TABLE = values_of(dtype("float8_e4m3fn"))
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def test_tables() -> None:
    assert e2m1().tolist() == [_e2m1(code) for code in range(16)]
    assert np.signbit(e2m1()[8])
    table = values_of(dtype("float8_e4m3fn"))
    assert table[0x7E] == 448
    assert np.isnan(table[0x7F])
    assert table[1] == 2**-9
    powers = values_of(dtype("uint8"))
    assert powers[127] == 1
    assert powers[0] == 2.0**-127
    assert powers[254] == 2.0**127
    assert np.isnan(powers[255])
    assert values_of(dtype("float8_e8m0fnu")).tobytes() == powers.tobytes()


def _e2m1(code: int) -> float:
    """From the definition: a sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa * 0.5))


def seen(tensor: LazyTensor, whole: np.ndarray[Any, Any], draw: Any) -> None:
    """Whole, in any box, in any run, turned and reshaped, the tensor is the array."""
    assert tensor.shape == whole.shape
    np.testing.assert_array_equal(tensor.numpy().view(tensor.dtype.raw), whole.view(tensor.dtype.raw))
    size = whole.size
    if size:
        start = draw(st.integers(0, size - 1))
        run = np.empty(draw(st.integers(1, size - start)), tensor.dtype.raw)
        tensor.read_flat(start, run)
        np.testing.assert_array_equal(run, whole.reshape(-1).view(tensor.dtype.raw)[start : start + len(run)])


@st.composite
def views(draw: st.DrawFn, tensor: LazyTensor, whole: np.ndarray[Any, Any]) -> tuple[LazyTensor, np.ndarray[Any, Any]]:
    for _ in range(draw(st.integers(0, 4))):
        what = draw(st.sampled_from(["box", "permute", "reshape", "every"]))
        if what == "box":
            key = []
            for n in whole.shape:
                first = draw(st.integers(0, n - 1))
                key.append(slice(first, draw(st.integers(first + 1, n))))
            tensor, whole = tensor[tuple(key)], whole[tuple(key)]
        elif what == "permute":
            order = draw(st.permutations(range(whole.ndim)))
            tensor, whole = tensor.permute(order), whole.transpose(order)
        elif what == "every":
            axis = draw(st.integers(0, whole.ndim - 1))
            tensor, whole = tensor.every(axis, 2), whole[(slice(None),) * axis + (slice(None, None, 2),)]
        else:
            shape = draw(st.sampled_from([whole.shape, (whole.size,), (1, *whole.shape), (*whole.shape, 1)]))
            if whole.shape[0] % 2 == 0 and draw(st.booleans()):
                shape = (2, whole.shape[0] // 2, *whole.shape[1:])
            if whole.ndim > 1 and draw(st.booleans()):
                shape = (whole.shape[0] * whole.shape[1], *whole.shape[2:])
            tensor, whole = tensor.reshape(shape), whole.reshape(shape)
    return tensor, np.ascontiguousarray(whole)


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(st.data(), SHAPES)
def test_two_codes_in_a_byte(data: st.DataObject, shape: tuple[int, ...]) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    packed = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=axis + 1).reshape(
        (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
    )
    seen(*data.draw(views(Halved(from_array(packed), axis), codes)), data.draw)


@given(st.data(), SHAPES)
def test_a_scale_for_each_block(data: st.DataObject, shape: tuple[int, ...]) -> None:
    block = tuple(data.draw(st.integers(1, 5)) for _ in shape)
    wanted = tuple(data.draw(st.integers((n - 1) * size + 1, n * size)) for n, size in zip(shape, block, strict=True))
    small = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    whole = small
    for axis, size in enumerate(block):
        whole = np.repeat(whole, size, axis)
    whole = np.ascontiguousarray(whole[tuple(slice(n) for n in wanted)])
    assume(whole.nbytes <= 1 << 20)  # what repeats a few values more often is not read whole
    seen(*data.draw(views(Repeated(from_array(small), block, wanted), whole)), data.draw)


@given(st.data(), st.integers(1, 300), st.integers(1, 300), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_codes_times_scales(data: st.DataObject, rows: int, columns: int, to: str) -> None:
    generator = np.random.default_rng(rows * columns)
    codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8).view(E4M3)
    scales = generator.normal(size=(-(-rows // 128), -(-columns // 128))).astype(np.float32)
    spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :columns]
    with np.errstate(over="ignore", invalid="ignore"):
        whole = (codes.astype(np.float32) * spread).astype(dtype(to).numpy)
    tensor = scaled(from_array(codes), TABLE, from_array(scales), (128, 128), dtype(to))
    view, expected = data.draw(views(tensor, whole))
    np.testing.assert_array_equal(view.numpy().view(view.dtype.raw), expected.view(view.dtype.raw))


@given(st.data(), st.sampled_from([np.uint8, E8M0]), st.sampled_from(["bfloat16", "float32"]))
def test_four_bits_times_powers_of_two(data: st.DataObject, kind: Any, to: str) -> None:
    generator = np.random.default_rng(5)
    packed = generator.integers(0, 256, (3, 5, 32), dtype=np.uint8)
    exponents = generator.integers(0, 255, (3, 5, 2), dtype=np.uint8)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(3, 5, 64)
    with np.errstate(over="ignore"):
        numbers = (e2m1()[codes] * np.repeat(2.0 ** (exponents - 127.0), 32, -1)).astype(np.float32)
    tensor = scaled(Halved(from_array(packed), 2), e2m1(), from_array(exponents.view(kind)), (1, 1, 32), dtype(to))
    view, expected = data.draw(views(tensor, numbers.astype(dtype(to).numpy)))
    np.testing.assert_array_equal(view.numpy().view(view.dtype.raw), expected.view(view.dtype.raw))


def test_a_scale_of_scales() -> None:
    scales = np.array([[1.5, 448, 0.0625]], np.float32).astype(E4M3)
    both = product(from_array(scales), from_array(np.array(0.1, np.float32)))
    np.testing.assert_array_equal(both.numpy(), scales.astype(np.float32) * np.float32(0.1))


def test_memory_is_bounded_by_blocks() -> None:
    """No array of the whole is made, whatever is asked for at once."""
    codes = from_array(np.ones((64, 1 << 17), np.uint8).view(E4M3))
    tensor = scaled(codes, TABLE, from_array(np.ones((1, 1 << 10), np.float32)), (128, 128), dtype("bfloat16"))
    assert isinstance(tensor, Mapped)
    largest = 0

    def watched(*operands: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal largest
        largest = max(largest, *(operand.nbytes for operand in operands))
        return tensor.function(*operands)

    Mapped(tensor.children, tensor.dtype, watched).numpy()
    assert 0 < largest <= 4 << 20
