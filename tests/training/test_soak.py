"""A few rounds of ``tools/soak_training.py``, each thing happening once; by hand it does as many as one likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.peer

SOAK = Path(__file__).parents[2] / "tools" / "soak_training.py"


def test_jobs_that_are_killed_at_random_moments() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SOAK), "--rounds", "5", "--seed", "5"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 rounds" in done.stdout and "whole after each" in done.stdout
