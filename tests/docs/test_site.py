"""The site's pages name what there is: every public name, and every page in the table of contents."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from anyckpt import cli

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE = ROOT / "docs" / "reference"
RENAMED = {"formats.registry.facts": "formats", "models.families.facts": "families"}


def named(page: str, module: str) -> set[str]:
    """Public names of a module that a page documents."""
    found = re.findall(r"(?m)^::: anyckpt\.(\S+)$", (REFERENCE / page).read_text(encoding="utf-8"))
    inner = module.partition(".")[2]
    names = {RENAMED.get(name, name) for name in found}
    return {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == inner}


@pytest.mark.parametrize(
    ("page", "module"),
    [("anyckpt.md", "anyckpt"), ("extend.md", "anyckpt.extend"), ("testing.md", "anyckpt.testing")],
)
def test_every_public_name_is_documented(page: str, module: str) -> None:
    assert named(page, module) == {name for name in import_module(module).__all__ if not name.startswith("__")}


def test_every_public_name_of_the_part_for_training_is_documented() -> None:
    text = (ROOT / "src" / "anyckpt" / "torch" / "__init__.py").read_text(encoding="utf-8")
    public = set(re.findall(r'"(\w+)"', text.partition("__all__ = [")[2].partition("]")[0]))
    assert named("torch.md", "anyckpt.torch") == public - {"dcp", "megatron"}


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(there)


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = cli.group.list_commands(click.Context(cli.group))
    assert re.findall(r"(?m)^## (\S+)$", text) == re.findall(r"(?m)^\$ anyckpt (\S+) --help$", text) == commands
