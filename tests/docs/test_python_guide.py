"""The sessions of Python in the documentation, run as they stand."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest
from tests.support import FIXTURES

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE = DOCS / "python.md"
OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def failures(text: str, languages: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for wanted, fixture in re.findall(r"<!-- here: (\S+) = (\S+) -->", text):
        copy = shutil.copytree if (FIXTURES / fixture).is_dir() else shutil.copy
        copy(FIXTURES / fixture, folder / wanted)
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```(pycon[ \w]*)\n(.*?)```", text, re.DOTALL)
    session = "\n".join(code for language, code in blocks if language in languages)
    test = doctest.DocTestParser().get_doctest(session, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 3
    told: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=told.append)
    return "".join(told)


def test_the_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"```(\w[\w ]*)", text)) == {"pycon", "pycon torch"}
    assert not failures(text, ("pycon",), tmp_path, monkeypatch)


WITH_SESSIONS = sorted(path for path in DOCS.rglob("*.md") if path != PAGE and "```pycon" in path.read_text("utf-8"))


@pytest.mark.parametrize("page", WITH_SESSIONS, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_page_with_sessions_is_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failures(page.read_text(encoding="utf-8"), ("pycon",), tmp_path, monkeypatch)


@pytest.mark.peer
def test_the_sessions_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    text = PAGE.read_text(encoding="utf-8")
    assert not failures(text, ("pycon", "pycon torch"), tmp_path, monkeypatch)


def test_a_session_that_says_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "```pycon\n>>> 1 + 1\n2\n>>> 2\n2\n>>> 3\n3\n>>> 4\n5\n```\n"
    assert "Expected:\n    5" in failures(text, ("pycon",), tmp_path, monkeypatch)
