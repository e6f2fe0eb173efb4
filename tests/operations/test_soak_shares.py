"""A few rounds of ``tools/soak_shares.py``; by hand it does as many as one likes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "tools" / "soak_shares.py"


def test_shares_that_are_killed_and_started_anew() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SOAK), "--rounds", "5", "--seed", "7", "--processes", "2"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["rounds"] == 5 and told["killed"] >= 5
