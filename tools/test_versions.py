"""The tests with other releases than the locked ones: ``python3 tools/test_versions.py newest`` or ``oldest``.

By hand: what passes today may fail tomorrow without anybody touching the code, which is why the README's commands do
not do this.  ``newest`` takes the newest release of every dependency, ``oldest`` the oldest that pyproject.toml allows.
Further arguments are passed on to pytest.  docs/dependencies.md has the last outcome.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path

from chromium import prepare_browser
from current_peers import prepare as prepare_current_peers
from environment import prepare
from lock import resolve
from test import passes, tests

_RESOLUTIONS = {"newest": "highest", "oldest": "lowest-direct"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=_RESOLUTIONS)
    which = parser.parse_known_args()[0].which
    arguments = parser.parse_known_args()[1]
    version = ".".join(platform.python_version_tuple()[:2])
    options = ["--python-version", version, "--resolution", _RESOLUTIONS[which]]
    with tempfile.TemporaryDirectory() as folder:
        core, full = Path(folder) / "core.txt", Path(folder) / "test.txt"
        core.write_text(resolve(["test-core"], options))
        full.write_text(resolve(["test"], options))
        for lock in (core, full):
            print(f"== {which} on Python {version}, {lock.stem}\n{lock.read_text()}", flush=True)
        interpreters = (
            prepare(f".venv-{which}-core", lock=core, extras="test-core"),
            prepare(f".venv-{which}-test", lock=full, first=["torch"], extras="test"),
        )
    prepare_current_peers(interpreters[1])
    prepare_browser()
    sys.exit(0 if passes(tests(*interpreters, arguments)) else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
