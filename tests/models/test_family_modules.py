"""What the modules of families may take from each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from anyckpt.models import families

_PACKAGE = families.__name__
_FOLDER = Path(families.__file__).parent
_MODULES = sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


def _imported(path: Path) -> Iterator[str]:
    """Modules and names that a module imports, in full and wherever it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _families_of(path: Path) -> set[str]:
    inside = (name.removeprefix(f"{_PACKAGE}.") for name in _imported(path) if name.startswith(f"{_PACKAGE}."))
    return {name.split(".")[0] for name in inside} & set(_MODULES)


@pytest.mark.parametrize("module", _MODULES)
def test_a_family_has_at_most_one_predecessor(module: str) -> None:
    """What several families share is a part, not one of them."""
    assert len(_families_of(_FOLDER / f"{module}.py") - {module}) <= 1


def test_parts_are_of_no_family() -> None:
    """A part that took from a family would make that family the base of all that have the part."""
    parts = sorted((_FOLDER / "parts").glob("*.py"))
    assert len(parts) > 1
    assert {path.name: _families_of(path) for path in parts} == {path.name: set() for path in parts}


@pytest.mark.parametrize("module", _MODULES)
def test_no_family_counts_another_s_rules_or_fields(module: str) -> None:
    """Positions in another module's tuples say nothing, and move."""
    tree = ast.parse((_FOLDER / f"{module}.py").read_text("utf-8"))
    others = _families_of(_FOLDER / f"{module}.py") | {path.stem for path in (_FOLDER / "parts").glob("*.py")}
    counted = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and ast.unparse(node.value).split(".")[0] in others
        and isinstance(node.slice, (ast.Slice, ast.Constant))
        and not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str))
    ]
    assert counted == []
