"""Makes the locks of the environments: ``python3 tools/lock.py``.

A lock names one exact version of every package, transitive ones included, for each Python from 3.10 to 3.13, so that
the README's commands make the same environments on every machine and on every day.  uv resolves them; the locks hold
versions and markers only, and pip reads them as constraints.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from environment import LOCKS, ROOT

_HEAD = "# Made by python3 tools/lock.py: exact versions for Python 3.10 to 3.13.\n"
_ENVIRONMENTS = {"core.txt": ("test-core",), "test.txt": ("test", "dev"), "docs.txt": ("docs",)}


def main() -> None:
    LOCKS.mkdir(exist_ok=True)
    for name, extras in _ENVIRONMENTS.items():
        pins = resolve(extras, ["--universal", "--python-version", "3.10"])
        (LOCKS / name).write_text(_HEAD + pins)
        print(f"{LOCKS / name}: {len(pins.splitlines())} lines")


def resolve(extras: Sequence[str], options: Sequence[str]) -> str:
    """Exact versions of all that the project with ``extras`` needs, and of what builds it; a line each.

    Args:
        extras: of the project.
        options: of ``uv pip compile``.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.EnvBuilder(with_pip=True).create(folder)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "uv"], check=True)
        build = Path(folder) / "build.in"
        build.write_text("hatchling>=1.18\n")
        command = [
            python, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url",
            *options, *(f"--extra={extra}" for extra in extras), str(ROOT / "pyproject.toml"), str(build),
        ]  # fmt: skip
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
