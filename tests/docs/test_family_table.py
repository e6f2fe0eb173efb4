"""The table of families is made from what attempts give, and its check can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import family_table

    return family_table


def test_cells_say_what_all_and_what_some_can(tool) -> None:  # type: ignore[no-untyped-def]
    cell = tool.Cell()
    assert cell.text == "-"
    for able in (True, False):
        cell.add("r", True)
        cell.add("w", able)
        cell.add("o", False)
    assert cell.text == "r (w)"


def test_a_row_is_what_the_family_can(tool) -> None:  # type: ignore[no-untyped-def]
    from anyckpt.formats import registry

    targets = [registry.by_name(name) for name in ("nemo", "nemo2", "megatron-core")]
    reasons: dict[str, list[str]] = {}
    row = tool.family_row("gpt_neox", tool.PROOFS["gpt_neox"], targets, reasons)
    assert row[2:5] == ["rw", "(rwo)", "rwo"]
    assert reasons == {"NeMo 2's models of family gpt_neox have no parallel_residual": ["pythia"]}


def test_the_check(
    tool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "families.md")
    monkeypatch.setattr(tool, "page", lambda: "made\n")
    monkeypatch.setattr(sys, "argv", ["family_table.py", "--check"])
    with pytest.raises(SystemExit, match="not current"):
        tool.main()
    monkeypatch.setattr(sys, "argv", ["family_table.py"])
    tool.main()
    monkeypatch.setattr(sys, "argv", ["family_table.py", "--check"])
    tool.main()
    (tmp_path / "families.md").write_text("typed by hand\n")
    with pytest.raises(SystemExit, match="not current"):
        tool.main()
