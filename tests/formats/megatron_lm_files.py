"""Changing rank files for tests, without torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import file_bytes, fixture_path

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.formats.megatron_lm import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.storage.local_file import LocalFile

FILE = "model_optim_rng.pt"


def copy_fixture(name: str, destination: Path) -> Path:
    """A copy of a fixture that a test may damage; gives the training root."""
    return Path(shutil.copytree(fixture_path(f"legacy/{name}"), destination / name))


def open_layout(path: Path) -> Checkpoint:
    location = look_at(path)
    assert FORMAT.detect(location)
    return FORMAT.read(location)


def root_of(path: Path) -> dict[Any, Any]:
    root = read_torch(LocalFile(path)).root
    assert isinstance(root, dict)
    return root


def change_rank(path: Path, change: Callable[[dict[Any, Any]], None]) -> None:
    """Rewrite a rank's file after ``change`` has been at its contents."""
    root = root_of(path)
    change(root)
    write_torch(path, root)


def write_torch(path: Path, root: Any) -> None:
    data = file_bytes(OutputFile("", zip_parts(root)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
