"""``anyckpt merge``: options, JSON, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

import anyckpt as api

MERGEKIT = fixture_path("mergekit")
WORDS = (MERGEKIT / "a", MERGEKIT / "b", "--base", MERGEKIT / "base", "--method", "ties")


def test_the_json_is_that_of_convert(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("merge", *WORDS, "-o", tmp_path / "out", "--density", "0.5", "--json")
    planned = anyckpt(*words, "--dry-run").json
    assert planned["dry_run"] is True and not (tmp_path / "out").exists()
    found = anyckpt(*words).json
    assert found["format"] == "hf" and found.keys() | {"files"} == planned.keys()
    assert found["notes"][0].endswith("whose configuration and files go along; density 0.5, 0.5")


def test_numbers_for_each(anyckpt: Runner, tmp_path: Path) -> None:
    assert anyckpt("merge", *WORDS, "-o", tmp_path / "out", "--density", "0.2,0.4", "--weights", "1,-0.5").code == 0
    api.merge(WORDS[:2], tmp_path / "same", base=WORDS[3], method="ties", density=[0.2, 0.4], weights=[1, -0.5])  # type: ignore[arg-type]
    assert api.diff(tmp_path / "out", tmp_path / "same").equal


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--density", "0.2,0.4,0.6"), "--density has not a number for each source"),
        (("--density", "some"), "expected numbers with commas between"),
        (("--recipe", MERGEKIT / "ties.yaml"), "a recipe says itself"),
        (("--t", "0.5"), "--t means nothing to ties"),
    ],
)
def test_refusals(anyckpt: Runner, words: tuple[str | Path, ...], message: str, tmp_path: Path) -> None:
    assert message in anyckpt("merge", *WORDS, "-o", tmp_path / "out", *words).error
