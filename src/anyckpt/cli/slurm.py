"""A script for Slurm that runs a command by several processes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from anyckpt.errors import UsageError

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --chdir={folder}
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=1G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
# What is given to sbatch goes before these lines: sbatch --nodes=8 --partition=NAME {file}
# Every task does an equal share; all must see the same paths.  Run again or requeued, it goes on from what is there.
set -euo pipefail
srun --kill-on-bad-exit=0 {command}
"""


def print_script(command: str, words: Sequence[str], asked_by: str) -> None:
    """Print a batch script in which every task does a share of a command's work.

    Args:
        command: of ``anyckpt``.
        words: its arguments.
        asked_by: the one of them that asked for this.

    Raises:
        UsageError: one of them means nothing there.
    """
    for word in words:
        if word.partition("=")[0] in ("--share", "--dry-run"):
            raise UsageError(f"{word} means nothing in a script for Slurm", remedy=f"leave it out, or {asked_by}")
    line = [sys.executable, "-m", "anyckpt", command, *(word for word in words if word != asked_by), "--share", "auto"]
    text = _SCRIPT.format(
        name=f"anyckpt-{command}",
        folder=shlex.quote(os.getcwd()),
        log=f"anyckpt-{command}-%j.log",
        file=f"{command}.sbatch",
        command=shlex.join(line),
    )
    print(text, end="")
