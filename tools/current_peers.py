"""The newest releases of Megatron, beside the environment of the tests: ``python3 tools/current_peers.py``.

Megatron-Core from 0.17 on and Megatron-Bridge ask for Python 3.12, and the tests' environment has an older
Megatron-Core, which much of the field still runs.  Their code is plain Python that any of the tests' Pythons runs, so
the wheels that ``tools/locks/current.txt`` names are unpacked into ``.venv-current``, and processes of tests that are
started with it on ``PYTHONPATH`` find them before the older release.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from environment import LOCKS, ROOT

FOLDER = ROOT / ".venv-current"
LOCK = LOCKS / "current.txt"
_PYTHON = "3.12"


def prepare(python: str | Path = sys.executable) -> Path:
    """The folder that holds the locked releases; it is made anew when the lock has changed.

    Args:
        python: an interpreter that has pip, of any version.
    """
    stamp, wanted = FOLDER / "made-of", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return FOLDER
    print(f"making {FOLDER.name}: the newest releases of Megatron", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [str(python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        what = ["--no-deps", "--only-binary", ":all:", "--python-version", _PYTHON, "--requirement", str(LOCK)]
        subprocess.run([*pip, *what, "--dest", wheels], check=True)
        for wheel in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(FOLDER)
    stamp.write_text(wanted)
    return FOLDER


if __name__ == "__main__":
    print(prepare())
