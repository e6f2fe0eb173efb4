"""Virtual environments for the two commands of the README, made with nothing but Python."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OLDEST = (3, 10)


def prepare(name: str, *, first: Sequence[str] = (), requirement: str = ".") -> Path:
    """The interpreter of the environment ``name`` in the project's folder, made and filled if it is not yet.

    Args:
        name: folder under the project's root.
        first: requirements to install before all others (torch, so that nothing else pulls in another build of it).
        requirement: the project with the extras that are wanted, such as ``.[test]``.
    """
    if sys.version_info < _OLDEST:
        sys.exit(f"Python {_OLDEST[0]}.{_OLDEST[1]} or later is needed; this is {sys.version.split()[0]}")
    folder = ROOT / name
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {name} ...", flush=True)
        venv.EnvBuilder(with_pip=True).create(folder)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for wanted in first:
        subprocess.run([*pip, wanted], check=True, cwd=ROOT)
    subprocess.run([*pip, "--editable", requirement], check=True, cwd=ROOT)
    return python
