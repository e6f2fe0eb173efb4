"""The demonstration says what it does, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = "LlamaShape(layers=1, hidden=16, intermediate=16, heads=2, kv_heads=1, vocabulary=64)"


def test_the_demonstration_tells_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import demo

    monkeypatch.setattr(demo, "prepare", lambda *_, **__: Path(sys.executable))
    monkeypatch.setattr(demo, "_SHAPE", TINY)
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "llama.nemo").write_text("of an earlier run")
    demo.main()
    out = capfd.readouterr().out
    assert all(f"[{number}/8] " in out for number in range(1, 9))
    assert out.count("yes, ") == 8
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {"mine", "llama-hf", "llama.nemo", "llama-nemo2", "llama-megatron", "llama-back"}


def test_what_nobody_asked_to_keep_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import demo

    with pytest.raises(KeyboardInterrupt), demo.folder_for([]) as folder:
        (folder / "model").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not folder.exists()
