"""What the guides show is what is there: code, and what commands print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import guides  # noqa: E402

import anyckpt  # noqa: E402

PAGES = {str(page.relative_to(ROOT)): page for page in guides.pages()}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    found = guides.differences(PAGES[name])
    assert not found, f"run python3 tools/guides.py\n{found}"


def test_every_journey_has_a_page() -> None:
    index = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(guide/(\S+?\.md)\)", index))
    assert linked == {path.name for path in (ROOT / "docs" / "guide").iterdir()}
    assert {f"docs/guide/{name}" for name in linked} < set(PAGES)


def test_a_page_that_says_something_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- here: llama = families/llama/hf -->\n\n```console\n$ ls llama | head -1\nconfig.yaml\n```\n")
    assert "-config.yaml\n+config.json" in guides.differences(page)
    page.write_text(guides.made(page.read_text()))
    assert not guides.differences(page)
    page.write_text("`examples/anyckpt_more/pyproject.toml`:\n\n```toml\n[project]\n```\n")
    assert "+requires = " in guides.differences(page)


def test_a_line_that_differs_in_a_time_alone_stays_as_it_is() -> None:
    page = "```console\n$ printf 'out in 1.5 s\\n3 files\\n'\nout in 0.02 s\n2 files\n```\n"
    assert guides.current(page) == page.replace("2 files", "3 files")


def test_times_may_differ_and_counts_may_not() -> None:
    lines = [f"out: hf, {n} tensors, 3 kB in {t} s ({m} kB/s, peak memory {m} MB)" for n, t, m in
             ((2, "0.02", 44), (2, "1.5", 51), (3, "0.02", 44))]  # fmt: skip
    first, second, third = (guides._VARYING.sub("", line) for line in lines)
    assert first == second != third


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)]*))?\)", text):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"(?m)^#+ (.+)$", there.read_text(encoding="utf-8"))
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_every_format_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "formats").iterdir()}
    assert pages == {name for name, facts in anyckpt.formats().items() if facts.own} | {"quantized"}
    table = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"](formats/{name}.md)" in table for name in pages)
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": formats/{name}.md\n" in site for name in pages)
