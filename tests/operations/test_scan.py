"""Statistics and digests against numpy on whole arrays."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.dtypes import dtype
from anyckpt.errors import UnsafeError
from anyckpt.operations.steps import statistics as module
from anyckpt.operations.steps.number_bits import PATTERNS
from anyckpt.operations.steps.statistics import Statistics, counts, scan
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Constant, Stored, from_array


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 16)


def statistics_of(array: np.ndarray) -> Statistics:
    found = scan(from_array(array), statistics=True, digest=False).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(
    "kind", ["float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_moments_of_floats_are_those_of_the_whole_array(kind: object) -> None:
    array = (np.random.default_rng(1).standard_normal(1000) * 3 + 7).astype(kind)
    array[::10] = 0
    found, exact = statistics_of(array), array.astype(np.float64)
    assert (found.min, found.max) == (exact.min(), exact.max())
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert found.std == pytest.approx(exact.std(), rel=1e-12)
    assert (found.zeros, found.nan, found.inf) == (100, 0, 0)


def test_a_large_mean_does_not_cancel_the_deviation() -> None:
    array = 1e9 + np.arange(1000.0)
    assert statistics_of(array).std == pytest.approx(array.std(), rel=1e-12)


@pytest.mark.parametrize("kind", ["float64", "complex128"])
@pytest.mark.parametrize("size", [1e160, 1e300, 1.7e308])
@pytest.mark.parametrize("where", [slice(None), slice(3, 4), slice(20, 21), slice(70, None)])
def test_moments_of_numbers_whose_squares_are_too_large(kind: str, size: float, where: slice) -> None:
    array = np.random.default_rng(2).uniform(-1, 1, 100).astype(kind)
    array[where] *= size
    array[50], array[10] = np.nan, 0
    found, exact = statistics_of(array), np.abs(array) if kind == "complex128" else array
    small = exact[np.isfinite(exact)] / size
    assert found.mean is not None and found.mean / size == pytest.approx(small.mean(), rel=1e-9)
    assert found.std is not None and found.std / size == pytest.approx(small.std(), rel=1e-9)
    assert (found.nan, found.inf, found.zeros) == (1, 0, 1)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_of_numbers_of_one_sign(kind: object, sign: int) -> None:
    array = (sign * np.linspace(0.5, 8, 60)).astype(kind)
    found = statistics_of(array)
    assert (found.min, found.max) == (float(min(array)), float(max(array)))


@pytest.mark.parametrize("mean", [0.0, 0.1, 1.0, -30.0, 1e4])
def test_deviations_are_exact_however_far_the_mean_is_from_zero(mean: float) -> None:
    array = np.random.default_rng(3).standard_normal(5000) * 0.01 + mean
    assert statistics_of(array).std == pytest.approx(array.std(), rel=1e-13)


def test_nan_and_infinity_are_counted_and_left_out_of_moments() -> None:
    array = np.array([1, np.nan, np.inf, -np.inf, 3, -0.0], dtype=np.float32)
    found = statistics_of(array)
    assert (found.nan, found.inf, found.zeros) == (1, 2, 1)
    assert (found.min, found.max, found.mean) == (0, 3, pytest.approx(4 / 3))


def test_nothing_finite_has_no_moments() -> None:
    found = statistics_of(np.full(40, np.nan, dtype=np.float32))
    assert (found.min, found.max, found.mean, found.std, found.nan) == (None, None, None, None, 40)
    assert statistics_of(np.zeros((0, 3), dtype=np.float32)).mean is None


def test_integers_keep_their_exact_extremes() -> None:
    found = statistics_of(np.array([2**63 - 1, -(2**63), 0, 5], dtype=np.int64))
    assert (found.min, found.max, found.zeros) == (-(2**63), 2**63 - 1, 1)


def test_booleans_count_as_zero_and_one_whatever_byte_is_stored() -> None:
    found = scan(Stored(MemorySource(bytes([0, 1, 2, 0])), 0, dtype("bool"), (4,)), statistics=True, digest=False)
    assert found.statistics is not None
    assert (found.statistics.min, found.statistics.max, found.statistics.mean, found.statistics.zeros) == (0, 1, 0.5, 2)


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_complex_numbers_are_described_by_their_magnitude(kind: str) -> None:
    found = statistics_of(np.array([3 + 4j, 0, complex(np.nan, 1), complex(0, np.inf)], dtype=kind))
    assert (found.min, found.max, found.nan, found.inf, found.zeros) == (0, 5, 1, 1, 1)


def test_half_precision_complex_numbers_are_understood_too() -> None:
    pairs = np.array([3, 4, 0, 0], dtype="<f2")
    found = scan(Stored(MemorySource(pairs), 0, dtype("complex32"), (2,)), statistics=True, digest=True)
    assert found.statistics is not None
    assert (found.statistics.max, found.statistics.zeros) == (5, 1)


def test_packed_types_have_a_digest_and_no_statistics() -> None:
    data = bytes(range(7))
    found = scan(Stored(MemorySource(data), 0, dtype("float4_e2m1fn_x2"), (7,)), statistics=True, digest=True)
    assert found.statistics is None
    assert found.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("kind", "small"),
    [("float32", 1e-42), ("float64", 1e-310), ("float16", 1e-6), (ml_dtypes.bfloat16, 1e-40)],
)
def test_denormal_numbers_are_counted(kind: object, small: float) -> None:
    assert statistics_of(np.array([small, 1, 0, -small] * 20).astype(kind)).denormals == 40


def test_eight_bit_floats_have_no_denormals_worth_counting() -> None:
    assert statistics_of(np.array([2**-9, 1]).astype(ml_dtypes.float8_e4m3fn)).denormals == 0


def test_the_digest_is_of_c_order_bytes_whatever_is_stored() -> None:
    array = np.arange(3000, dtype=np.float32).reshape(50, 60)
    found = scan(from_array(array).transpose(), statistics=False, digest=True)
    assert found.sha256 == hashlib.sha256(np.ascontiguousarray(array.T).tobytes()).hexdigest()
    assert found.statistics is None


def test_progress_adds_up_to_the_size() -> None:
    advanced: list[int] = []
    scan(from_array(np.zeros(1000, dtype=np.float32)), statistics=True, digest=False, advance=advanced.append)
    assert sum(advanced) == 4000
    assert len(advanced) > 10


def test_a_sum_that_overflows_is_no_infinity_among_the_elements() -> None:
    found = statistics_of(np.full(40, 1.7e308))
    assert (found.inf, found.nan, found.max) == (0, 0, 1.7e308)


def test_moments_of_the_largest_numbers_are_finite_in_json() -> None:
    huge = statistics_of(np.array([-1.7e308, 1.7e308] * 20))
    assert huge.max == 1.7e308
    assert huge.to_json()["std"] == pytest.approx(1.7e308)
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in huge.to_json().values())


def test_a_scalar_repeated_to_terabytes_is_refused() -> None:
    expanded = Stored(MemorySource(bytes(4)), 0, dtype("float32"), (1 << 40,), (0,))
    with pytest.raises(UnsafeError, match="repeats a few stored bytes"):
        scan(expanded, statistics=True, digest=True)


def test_padding_of_zeros_is_no_repetition() -> None:
    found = scan(Constant(dtype("float32"), (100,)), statistics=True, digest=False).statistics
    assert found is not None
    assert found.zeros == 100


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bfloat16", "float16", "float32", "float64"]), st.data())
def test_counts_of_bits_are_those_of_numbers(kind: str, data: st.DataObject) -> None:
    raw = dtype(kind).raw
    bits = data.draw(st.lists(st.integers(0, np.iinfo(raw).max), max_size=40))
    special = [0, PATTERNS[kind].infinity, PATTERNS[kind].normal]
    top = 1 << 8 * raw.itemsize - 1
    edges = [(at + d) % (2 * top) | sign for at in special for d in (-1, 0, 1) for sign in (0, top)]
    near = data.draw(st.lists(st.sampled_from(edges)))
    tensor = Stored(MemorySource(np.array(bits + near, raw).tobytes()), 0, dtype(kind), (len(bits) + len(near),))
    found, whole = counts(tensor), scan(tensor, statistics=True, digest=False).statistics
    assert whole is not None
    assert found == replace(whole, min=None, max=None, mean=None, std=None)
    values = tensor.numpy().astype(np.float64)
    normal = 2.0 ** {"float64": -1022, "float16": -14}.get(kind, -126)
    assert (whole.zeros, whole.nan) == (np.count_nonzero(values == 0), np.count_nonzero(np.isnan(values)))
    assert (whole.inf, whole.negative_inf) == (
        np.count_nonzero(np.isinf(values)),
        np.count_nonzero(np.isneginf(values)),
    )
    finite = values[np.isfinite(values)]
    assert (whole.min, whole.max) == ((finite.min(), finite.max()) if len(finite) else (None, None))
    assert whole.denormals == np.count_nonzero((np.abs(values) < normal) & (values != 0))


def test_what_bits_tell_is_not_asked_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over the float64 copy takes as long as four over the bits of a 16-bit type."""

    def asked(*arguments: object, **keywords: object) -> None:
        raise AssertionError("numbers were looked at")

    for name in ("abs", "isnan"):
        monkeypatch.setattr(np, name, asked)
    assert statistics_of(np.arange(100).astype(ml_dtypes.bfloat16)).zeros == 1


def test_types_whose_bits_are_not_counted() -> None:
    assert counts(Stored(MemorySource(b"abcd"), 0, dtype("float8_e4m3fn"), (4,))) is None
