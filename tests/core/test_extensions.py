"""Packages that register something wrong: one line that names them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.support import fixture_path

CODE = {
    "import fails": ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero; repair or uninstall odd"),
    "no such name": ("", "cannot be loaded: AttributeError"),
    "no module": (None, "cannot be loaded: ModuleNotFoundError"),
    "something else": (
        "THING = 3",
        "is not what it should be .expected a {kind}, found a int.; repair or uninstall odd",
    ),
}
GROUPS = {"families": "Family", "formats": "Format", "dialects": "OtherDialect"}


def with_package(folder: Path, group: str, code: str | None) -> dict[str, str]:
    """An environment in which a package is installed."""
    info = folder / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[anyckpt.{group}]\nthing = odd:THING\n")
    if code is not None:
        (folder / "odd.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", CODE)
def test_a_package_that_is_broken_is_named(group: str, case: str, tmp_path: Path) -> None:
    code, message = CODE[case]
    environment = with_package(tmp_path, group, code)
    (tmp_path / "weights.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    asks = {
        "families": ["convert", str(fixture_path("families/llama/hf")), str(tmp_path / "o"), "--to", "hf",
                     "--family", "thing"],
        "formats": ["inspect", str(tmp_path)],
        "dialects": ["convert", str(fixture_path("families/llama/hf")), str(tmp_path / "o"), "--to", "torch",
                     "--names", "thing"],
    }  # fmt: skip
    command = [sys.executable, "-m", "anyckpt", *asks[group]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"'thing' of anyckpt.{group}, which is odd:THING, " in done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(message.format(kind=GROUPS[group]), done.stderr)


def test_what_needs_no_package_does_not_load_it(tmp_path: Path) -> None:
    environment = with_package(tmp_path, "families", "1 / 0")
    command = [sys.executable, "-m", "anyckpt", "inspect", str(fixture_path("families/llama/hf"))]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def test_what_an_archive_registers_is_not_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        archive.writestr("odd-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
        archive.writestr("odd-1.0.dist-info/entry_points.txt", "[anyckpt.formats]\nthing = odd:THING\n")
        archive.writestr("odd.py", "1 / 0")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages.zip")}
    command = [sys.executable, "-m", "anyckpt", "inspect", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'thing' of anyckpt.formats" in done.stderr
