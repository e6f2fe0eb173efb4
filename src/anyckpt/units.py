"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

from anyckpt.errors import UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)\s*", re.IGNORECASE)
_POWERS = " kmgtp"
_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def parse_bytes(text: str | int, option: str = "a size") -> int:
    """Bytes from ``5GB`` (powers of 1000), ``5GiB`` (powers of 1024) or a plain number of bytes.

    Args:
        text: what the user wrote; a number is returned as it is.
        option: what to call it in a message.

    Raises:
        UsageError: it is not a size, or it is zero.
    """
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None or (match[3] and not match[2]):
            raise UsageError(
                f"{option} is not a size", expected="a number and a unit such as 5GB, 512MB or 2GiB", found=repr(text)
            )
        base = 1024 if match[3] else 1000
        value = int(float(match[1]) * base ** _POWERS.index(match[2].lower() or " "))
    if value <= 0:
        raise UsageError(f"{option} must be larger than nothing", expected="at least 1 byte", found=repr(text))
    return value


def byte_unit(count: float) -> tuple[float, str]:
    """The decimal unit in which people say such a number of bytes: how many bytes it has, and its name."""
    power = 0
    while count >= 999.5 and power < len(_UNITS):
        count /= 1000
        power += 1
    return 1000.0**power, _UNITS[power - 1] if power else "B"


def format_bytes(count: float) -> str:
    """``16.1 GB``: three digits and a decimal unit."""
    unit, name = byte_unit(count)
    count /= unit
    digits = 0 if unit == 1 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:,.{digits}f} {name}"


def format_seconds(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size_label(parameters: int) -> str:
    """A number of parameters as people say it: ``8.0B``, ``405.9B``, ``74.9K``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)
