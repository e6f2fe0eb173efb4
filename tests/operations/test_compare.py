"""Element-wise comparison of tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.dtypes import dtype
from anyckpt.operations.steps import compare as module
from anyckpt.operations.steps.compare import compare
from anyckpt.operations.steps.deviation import Deviation
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.tensor import from_array

EXACT = Tolerance()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 128)


def deviation(a: np.ndarray, b: np.ndarray, rtol: float = 0.0, atol: float = 0.0) -> Deviation | None:
    return compare(from_array(np.asarray(a)), from_array(np.asarray(b)), Tolerance(rtol, atol))


@pytest.mark.parametrize(
    "kind", ["float32", "int64", "bool", "complex128", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_the_same_bits_are_equal(kind: object) -> None:
    array = np.random.default_rng(0).integers(0, 2, (10, 10)).astype(kind)
    assert deviation(array, array.copy()) is None


def test_the_same_nan_is_equal_and_another_nan_is_not() -> None:
    a = np.array([0x7FC00000, 0x3F800000], dtype=np.uint32).view(np.float32)
    b = np.array([0x7FC00001, 0x3F800000], dtype=np.uint32).view(np.float32)
    assert deviation(a, a.copy()) is None
    assert deviation(a, b) == Deviation("values", 0.0, 0.0, 1, 1, 1)
    assert deviation(a, b, atol=1e-9) is None


def test_negative_zero_differs_in_bits_only() -> None:
    a, b = np.array([0.0, 1.0]), np.array([-0.0, 1.0])
    assert deviation(a, b) == Deviation("values", 0.0, 0.0, 1, 0)
    assert deviation(a, b, rtol=1e-9) is None
    assert deviation(a.astype(complex), b.astype(complex)) == Deviation("values", 0.0, 0.0, 1, 0)


def test_largest_differences_are_over_all_chunks() -> None:
    a = np.linspace(1, 2, 100)
    b = a.copy()
    b[3] += 0.5
    b[90] *= 1.5
    found = deviation(a, b)
    assert found is not None
    assert (found.reason, found.elements) == ("values", 2)
    assert found.max_abs == pytest.approx(np.abs(a - b).max())
    assert found.max_rel == pytest.approx((np.abs(a - b) / np.abs(b)).max())


def test_a_tolerance_is_relative_to_the_second_tensor() -> None:
    assert deviation(np.array([90.0]), np.array([100.0]), rtol=0.1) is None
    assert deviation(np.array([100.0]), np.array([90.0]), rtol=0.1) is not None
    assert deviation(np.array([1.0]), np.array([1.5]), atol=0.5) is None


def test_types_differ_unless_a_tolerance_is_given() -> None:
    a = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    b = a.astype(ml_dtypes.bfloat16)
    assert deviation(a, b) == Deviation("dtype", 0.0, 0.0, 0, 0)
    assert deviation(a, b, rtol=1e-6) is None
    c = np.array([1.0, 2.0, 3.015625], dtype=np.float32)
    found = deviation(c, b)
    assert found is not None
    assert (found.reason, found.max_abs, found.elements) == ("dtype", 0.015625, 1)


def test_infinities_of_one_sign_are_equal_under_a_tolerance() -> None:
    a = np.array([np.inf, -np.inf, 1.0], dtype=np.float32)
    assert deviation(a, a.astype(np.float64), atol=0.1) is None
    found = deviation(a, np.array([np.inf, np.inf, 1.0], dtype=np.float32), atol=0.1)
    assert found is not None
    assert (found.elements, found.nonfinite, found.max_abs) == (1, 1, 0.0)


def test_a_number_against_nan_differs_under_any_tolerance() -> None:
    found = deviation(np.array([1.0, 2.0]), np.array([np.nan, 2.0]), rtol=1e9, atol=1e9)
    assert found is not None
    assert (found.elements, found.nonfinite) == (1, 1)


def test_integers_are_compared_bit_by_bit_and_not_as_floats() -> None:
    assert deviation(np.array([2**62], dtype=np.int64), np.array([2**62 + 1], dtype=np.int64)) is not None


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_neighbours_that_float64_takes_for_one_differ_under_a_tolerance(kind: str) -> None:
    a, b = (np.array([5, number], kind) for number in (2**60, 2**60 + 1))
    for found in (deviation(a, b, atol=0.5), deviation(b, a, atol=0.5)):
        assert found is not None
        assert (found.elements, found.max_abs) == (1, 1.0)
    assert deviation(a, b, atol=1.0) is None
    low, high = (np.array([number], "int64") for number in (-(2**63), 2**63 - 1))
    found = deviation(low, high, atol=1.0)
    assert found is not None
    assert found.max_abs == 2.0**64


def test_scalars_and_empty_tensors() -> None:
    assert deviation(np.array(3.0), np.array(3.0)) is None
    assert deviation(np.zeros((0, 4)), np.zeros((0, 4))) is None
    assert deviation(np.zeros((0, 4)), np.zeros((0, 4), dtype=np.float32)) == Deviation("dtype", None, None, 0, 0)


KINDS = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8", "int32"]


def over_all(a: np.ndarray, b: np.ndarray, raw: np.dtype) -> Deviation | None:
    """What the definition says, by numpy on whole arrays in float64."""
    unlike = a.view(raw) != b.view(raw)
    if not unlike.any():
        return None
    with np.errstate(all="ignore"):
        one, other = a.astype(np.float64), b.astype(np.float64)
        gap, finite = np.abs(one - other), np.isfinite(one) & np.isfinite(other)
        nonzero = finite & (other != 0)
        largest = gap[finite].max() if finite.any() else None
        steepest = (gap[nonzero] / np.abs(other[nonzero])).max() if nonzero.any() else None
    told = [None if value is None or np.isinf(value) else value for value in (largest, steepest)]
    nonfinite, nan = unlike & ~finite, unlike & (np.isnan(one) | np.isnan(other))
    return Deviation("values", *told, *(int(np.count_nonzero(some)) for some in (unlike, nonfinite, nan)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([0.02, 0.2, 1.0]), st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_what_is_told_is_what_float64_tells_of_the_whole_arrays(kind: str, often: float, seed: int, size: int) -> None:
    """Bits of every sort, and neighbours that only rounding tells apart, few and many of which differ."""
    random = np.random.default_rng(seed)
    raw = dtype(kind).raw
    a = random.integers(0, np.iinfo(raw).max, size, raw, endpoint=True)
    if random.integers(2):
        a = (random.standard_normal(size) * random.choice([1e-30, 1.0, 30.0])).astype(dtype(kind).numpy).view(raw)
    b = np.where(random.random(size) < often, a ^ random.choice(np.array([1, 3, np.iinfo(raw).max], raw), size), a)
    b[random.random(size) < random.choice([0.0, 0.3])] = 0
    one, other = (side.view(dtype(kind).numpy) for side in (a, b))
    assert deviation(one, other) == over_all(one, other, raw)


def test_a_difference_of_nothing_is_told_of_numbers_alike_when_others_are_none() -> None:
    """Wherever these are: in chunks of which every bit is the same, too."""
    a = np.ones(1000, np.float32)
    b = a.copy()
    b[700] = np.nan
    assert deviation(a, b) == Deviation("values", 0.0, 0.0, 1, 1, 1)
    a[0], b[:] = 1, 0
    b[700] = np.nan
    assert deviation(b, np.where(np.arange(1000) == 0, a, b)) == Deviation("values", 1.0, 1.0, 1, 0)
    nothing = np.full(1000, np.nan, np.float32)
    some = nothing.copy()
    some[3] = 1
    assert deviation(nothing, some) == Deviation("values", None, None, 1, 1, 1)
