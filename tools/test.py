"""Everything that a change must pass: ``python3 tools/test.py``.

Makes two environments in the project's folder.  In ``.venv-core``, which has no torch, the tests of the core run;
in ``.venv-test`` the linters, the type checker, the import contract, and the tests that load our output with the
real torch, Megatron-Core, transformers and Lightning.  Arguments are passed on to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environment import ROOT, prepare


def main() -> None:
    core = prepare(".venv-core", requirement=".[test-core]")
    full = prepare(".venv-test", first=["torch==2.13.0"], requirement=".[test,dev]")
    without_torch = subprocess.run([str(core), "-c", "import torch"], stderr=subprocess.DEVNULL, check=False)
    if without_torch.returncode == 0:
        sys.exit(".venv-core has torch, so it proves nothing about the core without it; delete it and run again")
    tests = [*sys.argv[1:], "-n", str(min(4, os.cpu_count() or 1))]
    scripts = full.parent
    steps = [
        ("format", [str(scripts / "ruff"), "format", "--check", "."]),
        ("lint", [str(scripts / "ruff"), "check", "."]),
        ("types", [str(scripts / "mypy")]),
        ("import contract", [str(scripts / "lint-imports")]),
        ("table of families", [str(core), str(ROOT / "tools" / "family_table.py"), "--check"]),
        ("tests of the core, without torch", [str(core), "-m", "pytest", "-m", "not peer", *tests]),
        ("tests against the real libraries", [str(full), "-m", "pytest", "-m", "peer", *tests]),
    ]
    failed = []
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for title, command in steps:
        print(f"\n== {title}", flush=True)
        environment = {**os.environ, **quiet, "ANYCKPT_NO_SKIPS": "1" if "peer" in command else "0"}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(title)
    print("\n== " + (f"failed: {', '.join(failed)}" if failed else "all passed"), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
