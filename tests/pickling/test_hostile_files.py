"""Files made to attack a loader: each gives a typed error or inert records, quickly, and nothing runs."""

from __future__ import annotations

import builtins
import json
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from anyckpt.errors import AnyckptError, FormatError, UnsafeError
from anyckpt.pickling import PersistentId, load
from anyckpt.pickling.plain import simplify, to_plain
from anyckpt.pickling.walk import find_leaves
from anyckpt.pickling.writer import dumps

_FOLDER = Path(__file__).parents[1] / "fixtures" / "legacy" / "malicious"
_EXPECTED = json.loads((_FOLDER / "expected.json").read_text())
_REFUSED: dict[str, type[AnyckptError]] = {
    "binunicode_lie.pt": FormatError,
    "build_on_class.pt": UnsafeError,
    "ext_opcode.pt": UnsafeError,
    "frame_lie.pt": FormatError,
    "long4_lie.pt": FormatError,
    "not_a_checkpoint.pt": FormatError,
    "stack_underflow.pt": FormatError,
    "truncated.pt": FormatError,
    "unknown_opcode.pt": FormatError,
}


def _pickles(path: Path) -> list[bytes]:
    if not zipfile.is_zipfile(path):
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as archive:
        return [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]


def _read_and_use(pickles: list[bytes], name: str) -> None:
    for raw in pickles:
        if name in _REFUSED:
            with pytest.raises(_REFUSED[name]) as caught:
                load(raw, persistent_load=PersistentId, name=name)
            assert caught.type is _REFUSED[name]
            assert "\n" not in str(caught.value)
        else:
            value = load(raw, persistent_load=PersistentId, name=name)
            json.dumps(to_plain(value))
            simplify(value)
            list(find_leaves(value, lambda leaf: isinstance(leaf, PersistentId)))
            dumps(value)


@pytest.mark.parametrize("name", sorted(_EXPECTED["files"]))
def test_nothing_runs_and_nothing_hangs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    imported: list[str] = []
    real = builtins.__import__

    def spy(module: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(module)
        return real(module, *args, **kwargs)

    pickles = _pickles(_FOLDER / name)
    modules = set(sys.modules)
    monkeypatch.setattr(builtins, "__import__", spy)
    begin = time.process_time()
    try:
        _read_and_use(pickles, name)
        seconds = time.process_time() - begin
        tracemalloc.start()
        _read_and_use(pickles, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        monkeypatch.undo()
    assert not list(tmp_path.rglob(_EXPECTED["marker"]))
    assert not (_FOLDER / _EXPECTED["marker"]).exists()
    assert (seconds < 1, peak < 20 << 20) == (True, True)
    assert set(sys.modules) == modules
    assert not {"os", "posix", "torch", "_pickle", "pickle"} & set(imported)


def test_a_bomb_of_shared_lists_is_shown_found_and_written_within_bounds() -> None:
    bomb: list[Any] = []
    for _ in range(300):
        bomb = [bomb, bomb]
    assert load(dumps(bomb), name="t") is not None
    assert len(json.dumps(to_plain(bomb, max_nodes=10_000))) < 200_000
    assert list(find_leaves(bomb, lambda leaf: isinstance(leaf, float))) == []
    copied = simplify(bomb)
    assert copied[0] is copied[1]


def test_very_deep_data_is_shown_simplified_walked_and_written() -> None:
    deep: list[Any] = [1.5]
    for _ in range(20_000):
        deep = [deep]
    assert "..." in json.dumps(to_plain(deep))
    assert list(find_leaves(deep, lambda leaf: isinstance(leaf, PersistentId))) == []
    raw = dumps(deep)
    assert dumps(load(raw, name="t")) == raw
    assert dumps(simplify(deep)) == raw
    with pytest.raises(FormatError, match="nested too deep"):
        list(find_leaves([deep], lambda leaf: leaf == [1.5] and len(leaf) == 1 and leaf[0] == 1.5))
