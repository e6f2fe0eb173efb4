"""Sizes and times as people write and read them."""

from __future__ import annotations

import pytest

from anyckpt.errors import UsageError
from anyckpt.units import format_bytes, format_seconds, parse_bytes, size_label


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5GB", 5_000_000_000),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        ("2GiB", 2 << 30),
        ("1.5 KiB", 1536),
        ("7", 7),
        ("7B", 7),
        ("3T", 3_000_000_000_000),
        (12345, 12345),
    ],
)
def test_sizes_with_decimal_and_binary_units(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-5GB", "5iB", "5GB ago", "0", "0MB", 0, -1, "nan", "1e9"])
def test_what_is_no_size_is_refused_by_its_option(text: str | int) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1234, "1.23 kB"), (12_345_678, "12.3 MB"), (999_600, "1.00 MB"),
     (250e9, "250 GB"), (1e21, "1,000 EB")],
)  # fmt: skip
def test_bytes_are_shown_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1234, "0.12 s"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")]
)
def test_times(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_size_labels() -> None:
    assert [size_label(n) for n in (74_944, 8_030_261_248, 405_853_388_800, 512, 1_235_814_400)] == [
        "74.9K", "8.0B", "405.9B", "512", "1.2B",
    ]  # fmt: skip
