"""Virtual environments for the commands of the README, made with nothing but Python, of locked releases."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "tools" / "locks"
_OLDEST = (3, 10)
_UNLOCKED = {"anyckpt", "pip", "setuptools", "wheel"}  # ours, and what Python's own ensurepip brings
_LIST = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"


def prepare(name: str, *, lock: Path, first: Sequence[str] = (), extras: str = "") -> Path:
    """The interpreter of the environment ``name`` in the project's folder, which has exactly what its lock says.

    It is made anew when the lock or the project's requirements have changed, and otherwise left alone.

    Args:
        name: folder under the project's root.
        lock: a file of exact versions, one for each package that may come in.
        first: requirements to install before all others (torch, so that nothing else pulls in another build of it).
        extras: of the project, separated by commas.
    """
    if sys.version_info < _OLDEST:
        sys.exit(f"Python {_OLDEST[0]}.{_OLDEST[1]} or later is needed; this is {sys.version.split()[0]}")
    folder = ROOT / name
    interpreter = folder / "bin" / "python"
    stamp = folder / "made-of"
    wanted = _digest(lock, extras, sys.version)
    if stamp.exists() and stamp.read_text() == wanted and interpreter.exists():
        return interpreter
    started = time.monotonic()
    print(f"making {name}: the environment, with pip", flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    pip = [
        str(interpreter),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        str(lock),
    ]
    # the build back end comes from the lock, too: a build environment of pip's own would take its newest release
    print(f"making {name}: {', '.join(['hatchling', *first])}, which it is built with", flush=True)
    subprocess.run([*pip, "hatchling", *first], check=True, cwd=ROOT)
    project = f".[{extras}]" if extras else "."
    print(f"making {name}: anyckpt and what it needs", flush=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", project], check=True, cwd=ROOT)
    _check_locked(interpreter, lock)
    subprocess.run([str(interpreter), "-m", "compileall", "-q", "src"], check=True, cwd=ROOT)
    stamp.write_text(wanted)
    print(f"making {name}: done in {time.monotonic() - started:.0f} s", flush=True)
    return interpreter


def _digest(lock: Path, *words: str) -> str:
    found = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + lock.read_bytes())
    found.update("\0".join(words).encode())
    return found.hexdigest()


def _check_locked(interpreter: Path, lock: Path) -> None:
    """Stop where a package came in that the lock does not name: it would be another one tomorrow."""
    locked = {_canonical(line.split("==")[0]) for line in lock.read_text().splitlines() if "==" in line}
    listed = subprocess.run([str(interpreter), "-c", _LIST], check=True, stdout=subprocess.PIPE, text=True).stdout
    stray = sorted(line for line in listed.splitlines() if _canonical(line.split("==")[0]) not in locked | _UNLOCKED)
    if stray:
        sys.exit(f"{lock.name} does not name {', '.join(stray)}: make the locks again with python3 tools/lock.py")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
