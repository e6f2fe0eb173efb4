"""The examples for training processes run, and print what their guide pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.peer

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = {
    "fully_sharded.py": "live-state.md",
    "megatron_core.py": "drop-ins.md",
    "restorable.py": "restorable.md",
    "while_training.py": "training.md",
}


@pytest.mark.parametrize("name", PAGES)
def test_the_example_prints_what_its_page_says(name: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guide" / PAGES[name]).read_text(encoding="utf-8")
    assert f"`examples/training/{name}`:" in page
    (said,) = re.findall(r"It prints\n\n```text\n(.*?)```", page, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / "training" / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == said
