"""Checks that a format or family of your own keeps what anyckpt expects of it; call them from your tests.

>>> from anyckpt.testing import check_family, check_format                              # doctest: +SKIP
>>> check_format(my_format, tmp_path)                                                   # doctest: +SKIP
>>> check_family(my_family, json.loads(Path("config.json").read_text()))                # doctest: +SKIP

Each raises AssertionError with one line that says what is wrong.  The package whose format or family it is must be
installed, so that its entry point is found.  anyckpt's own formats and families go through the same checks.
"""

from __future__ import annotations

from anyckpt.testing.families import check_family
from anyckpt.testing.formats import (
    check_damage,
    check_format,
    check_plan,
    check_processes,
    check_reading,
    sample_checkpoint,
)

__all__ = [
    "check_damage",
    "check_family",
    "check_format",
    "check_plan",
    "check_processes",
    "check_reading",
    "sample_checkpoint",
]
