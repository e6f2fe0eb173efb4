"""Giving an output the name of another where the system swaps no names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from anyckpt.engine import publishing


def _folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def _without(monkeypatch: pytest.MonkeyPatch, refused: dict[Path, int]) -> None:
    """Let names not be swapped, and nothing of these paths be renamed."""
    rename = os.rename

    def some(source: os.PathLike[str], destination: os.PathLike[str]) -> None:
        number = refused.get(Path(source))
        if number is not None:
            raise OSError(number, os.strerror(number), source)
        rename(source, destination)

    monkeypatch.setattr(publishing, "_renamed", lambda *_: False)
    monkeypatch.setattr(os, "rename", some)


def test_the_old_output_is_put_back_where_the_new_one_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = _folder(tmp_path / "new", "new"), _folder(tmp_path / "out", "old")
    _without(monkeypatch, {new: errno.ENOTEMPTY})
    with pytest.raises(OSError, match="not empty"):
        publishing.put_in_place(str(new), str(old), str(tmp_path / "aside"))
    assert (old / "file").read_text() == "old"
    assert (new / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_folder_of_a_lower_layer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = _folder(tmp_path / "new", "new"), _folder(tmp_path / "out", "old")
    _without(monkeypatch, {old: errno.EXDEV})
    assert not publishing.put_in_place(str(new), str(old), str(tmp_path / "aside"))
    assert (old / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
