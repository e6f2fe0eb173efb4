"""What needs torch says so where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
for name in ("torch", "lightning"):
    sys.modules[name] = None
import anyckpt
from anyckpt import torch
from anyckpt.torch import lightning
assert torch.latest and torch.Retention
for package, name in ((torch, "save"), (torch, "Saver"), (lightning, "CheckpointIO")):
    try:
        getattr(package, name)
    except anyckpt.MissingLibraryError as error:
        print(error)
assert not hasattr(torch, "nothing")
"""


@pytest.mark.parametrize("line", ["anyckpt.torch.save needs torch", "pip install anyckpt[torch]", "anyckpt[lightning]"])
def test_the_extra_is_named(line: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout and done.stdout.count("\n") == 3
