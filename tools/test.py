"""Everything that a change must pass: ``python3 tools/test.py``.

Makes environments of locked releases in the project's folder.  In ``.venv-core``, which has no torch, the tests of the
core run; in ``.venv-test`` the linters, the type checker, the import contract, and the tests that load our output with
the real torch, Megatron-Core (an older release and, in processes of their own, the newest), transformers and Lightning,
and open our pages in a real browser, installed where there is none; in ``.venv-docs`` the documentation is built.
Arguments are passed on to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from chromium import prepare_browser
from current_peers import prepare as prepare_current_peers
from environment import LOCKS, ROOT, prepare

_QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    core = prepare(".venv-core", lock=LOCKS / "core.txt", extras="test-core")
    full = prepare(".venv-test", lock=LOCKS / "test.txt", first=["torch"], extras="test,dev")
    prepare_current_peers(full)
    prepare_browser()
    site = prepare(".venv-docs", lock=LOCKS / "docs.txt", extras="docs")
    steps = [*checks(core, full), ("documentation", documentation(site)), *tests(core, full, sys.argv[1:])]
    sys.exit(0 if passes(steps) else 1)


Step = tuple[str, list[str]]


def checks(core: Path, full: Path) -> list[Step]:
    """What needs no test to run: the text of the code, its types and its imports."""
    scripts = full.parent
    return [
        ("format", [str(scripts / "ruff"), "format", "--check", "."]),
        ("lint", [str(scripts / "ruff"), "check", "."]),
        ("types", [str(scripts / "mypy")]),
        ("import contract", [str(scripts / "lint-imports")]),
        ("table of families", [str(core), str(ROOT / "tools" / "family_table.py"), "--check"]),
    ]


def documentation(python: Path) -> list[str]:
    """Builds the site into ``site/``; a link, an anchor or a name that leads nowhere fails it."""
    return [str(python.parent / "zensical"), "build", "--clean", "--strict", "--config-file", "mkdocs.yml"]


def tests(core: Path, full: Path, arguments: Sequence[str]) -> list[Step]:
    """The tests of the core in an environment without torch, and those against the real libraries.

    Args:
        core: interpreter of an environment without torch.
        full: interpreter of one with all peers.
        arguments: for pytest.
    """
    without_torch = subprocess.run([str(core), "-c", "import torch"], stderr=subprocess.DEVNULL, check=False)
    if without_torch.returncode == 0:
        sys.exit(f"{core} has torch, so it proves nothing about the core without it; delete it and run again")
    shared = ["-n", str(min(4, os.cpu_count() or 1)), *arguments]
    return [
        ("tests of the core, without torch", [str(core), "-m", "pytest", "-m", "not peer", *shared]),
        ("tests against the real libraries", [str(full), "-m", "pytest", "-m", "peer and not browser", *shared]),
        ("pages in a real browser", [str(full), "-m", "pytest", "-m", "peer and browser", "-n", "0", *arguments]),
    ]


def passes(steps: Sequence[Step]) -> bool:
    """Whether all of them do; each is run, whatever became of those before it."""
    failed = []
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    for title, command in steps:
        print(f"\n== {title}", flush=True)
        with_peers = any(word.startswith("peer") for word in command)
        environment = {**inherited, **_QUIET, "ANYCKPT_NO_SKIPS": str(int(with_peers))}
        started = time.monotonic()
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(title)
        print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)
    print("\n== " + (f"failed: {', '.join(failed)}" if failed else "all passed"), flush=True)
    return not failed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
