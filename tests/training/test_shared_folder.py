"""The folder that ranks share while they write, and what becomes of what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

from anyckpt.engine.destination import BusyError
from anyckpt.engine.manifest import read_manifest
from anyckpt.errors import OutputError
from anyckpt.torch.shared_folder import SharedFolder

pytestmark = pytest.mark.peer


def written(path: Path, contents: bytes) -> None:
    shared = SharedFolder(path)
    shared.begin()
    for name in ("__0_0.distcp", "__1_0.distcp"):
        Path(shared.folder, name).write_bytes(contents)
    shared.publish(["__0_0.distcp", "__1_0.distcp"], lambda names: repr(dict(names)).encode(), [])


def test_the_root_of_a_file_system_is_written_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mount"
    path.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda found: found == str(path))
    assert SharedFolder(path).folder.startswith(str(path))
    written(path, b"one")
    assert sorted(os.listdir(path)) == [".anyckpt-manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert os.listdir(tmp_path) == ["mount"]


def test_what_is_replaced_is_whole_until_the_index_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    written(path, b"one")
    before = {name: (path / name).read_bytes() for name in os.listdir(path) if name != ".anyckpt-manifest.json"}

    def stopped(source: str, target: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopped)
        written(path, b"two")
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before
    assert os.listdir(tmp_path) == ["x"]
    written(path, b"three")
    assert (path / ".metadata").read_bytes() == b"{'__0_0.distcp': '__0_1.distcp', '__1_0.distcp': '__1_1.distcp'}"
    assert sorted(os.listdir(path)) == [".anyckpt-manifest.json", ".metadata", "__0_1.distcp", "__1_1.distcp"]
    manifest = read_manifest(str(path))
    assert manifest is not None and set(manifest.files) == {".metadata", "__0_1.distcp", "__1_1.distcp"}
    assert os.listdir(tmp_path) == ["x"]


def test_two_jobs_do_not_write_one_checkpoint(tmp_path: Path) -> None:
    first, second = SharedFolder(tmp_path / "x"), SharedFolder(tmp_path / "x")
    first.begin()
    with pytest.raises(BusyError):
        second.begin()
    second.discard()  # removes nothing of the other's
    assert os.path.isdir(first.folder)
    first.discard()
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_not_there_and_a_file_in_the_way_are_named(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path / "x")
    shared.begin()
    with pytest.raises(OutputError, match="what a rank wrote is not there"):
        shared.publish(["__0_0.distcp"], lambda names: b"", [])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is a file"):
        SharedFolder(tmp_path / "file").check_may_replace(True)
