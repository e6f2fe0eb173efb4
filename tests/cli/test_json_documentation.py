"""``docs/json.md`` lists the keys that commands print, and no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.operations.report import Report

DOCUMENT = (Path(__file__).parents[2] / "docs/json.md").read_text()


def documented(command: str) -> set[str]:
    """Keys in the first column of the command's first table."""
    section = DOCUMENT.partition(f"\n## {command}\n")[2].partition("\n## ")[0].lstrip("\n")
    table = section.partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


def test_inspect(anyckpt: Runner) -> None:
    found = anyckpt("inspect", fixture_path("families/llama/hf"), "--stats", "--tree", "--json").json
    assert set(found) == documented("inspect")
    for key in found["model"]:
        assert f"`{key}`" in DOCUMENT
    for key in found["tensors"][0]["stats"]:
        assert f"`{key}`" in DOCUMENT


def test_convert(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path("families/llama/hf"), tmp_path / "out", "--to", "torch", "--json")
    assert set(anyckpt(*words, "--dry-run").json) == documented("convert")
    assert set(anyckpt(*words).json) == documented("convert") - {"files"}


def test_diff(anyckpt: Runner) -> None:
    path = fixture_path("families/llama/hf")
    assert set(anyckpt("diff", path, path, "--json").json) == documented("diff")


def test_verify(anyckpt: Runner) -> None:
    found = anyckpt("verify", fixture_path("families/llama/hf"), "--json").json
    assert set(found) == documented("verify")
    assert all(f"`{key}`" in DOCUMENT for key in found["checked"])


def test_report() -> None:
    facts = {field.name for field in dataclasses.fields(Report)}
    assert facts == documented("report")
    assert set(Report("a", 1, 1, ()).to_json()) == facts
