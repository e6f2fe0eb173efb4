"""A script for Slurm that runs a command by several processes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
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
{first}srun --kill-on-bad-exit=0 {command}
"""


_FIRST = """\
# Found once, by one process, and given to all tasks.
[ -e {made} ] || {command}
"""


@dataclass(frozen=True)
class Steps:
    """What a script does, in arguments of one command.

    Attributes:
        tasks: of each task, which does its share.
        first: of one process before them; none if it has nothing to do.
        made: the file that it makes; if it is there, that is done.
    """

    tasks: Sequence[str]
    first: Sequence[str] = ()
    made: str = ""


def print_script(command: str, steps: Steps, asked_by: str, parameters: Mapping[str, Any]) -> None:
    """Print a batch script in which every task does a share of a command's work.

    Args:
        command: of ``anyckpt``.
        steps: its arguments.
        asked_by: the one of them that asked for this.
        parameters: what the arguments say.

    Raises:
        UsageError: one of them means nothing there, or tasks need another.
    """
    for word in steps.tasks:
        if word.partition("=")[0] in ("--share", "--dry-run", "--engine"):
            raise UsageError(f"{word} means nothing in a script for Slurm", remedy=f"leave it out, or {asked_by}")
    if "records" in parameters and parameters["records"] is None:
        raise UsageError(
            "the tasks of the script need a folder that all of them see, for what each of them finds",
            remedy="name one with --records DIR",
        )

    def line(words: Sequence[str]) -> str:
        return shlex.join([sys.executable, "-m", "anyckpt", command, *(word for word in words if word != asked_by)])

    text = _SCRIPT.format(
        name=f"anyckpt-{command}",
        folder=shlex.quote(os.getcwd()),
        log=f"anyckpt-{command}-%j.log",
        file=f"{command}.sbatch",
        first=_FIRST.format(made=shlex.quote(steps.made), command=line(steps.first)) if steps.first else "",
        command=line([*steps.tasks, "--share", "auto"]),
    )
    print(text, end="")
