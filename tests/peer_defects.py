"""Defects of single releases of the real libraries: tests that they break are expected to fail, and only there."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet


def broken_by(package: str, releases: str, raises: type[BaseException], what: str) -> pytest.MarkDecorator:
    """A test that fails because of the peer, and must pass with every other release of it.

    Args:
        package: its name on PyPI.
        releases: the releases that have the defect, such as ``>=5.24,<5.25``.
        raises: what the peer raises there; any other failure is ours.
        what: the defect, in one line.
    """
    found = version(package)
    return pytest.mark.xfail(
        SpecifierSet(releases).contains(found, prereleases=True),
        reason=f"{package} {found}: {what}", raises=raises, strict=True,
    )  # fmt: skip
