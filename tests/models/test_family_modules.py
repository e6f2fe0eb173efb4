"""What the modules of families may take from each other, and what they all declare."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.config.hugging_face import check_expected
from anyckpt.errors import MappingError
from anyckpt.models import families
from anyckpt.models.language.family import Family

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


_TWO_TOWERS = {"clip": {"clip_text", "clip_vision"}, "siglip": {"siglip_text", "siglip_vision"}}
"""Models that are made of two others, and those."""


@pytest.mark.parametrize("module", _MODULES)
def test_a_family_has_at_most_one_predecessor(module: str) -> None:
    """What several families share is a part, not one of them."""
    others = _families_of(_FOLDER / f"{module}.py") - {module}
    assert len(others - _TWO_TOWERS.get(module, set())) <= 1


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


_EXPECTED = [
    (family, key, value) for family in families.built_in() for key, value in family.hugging_face.expected.items()
]


@pytest.mark.parametrize(("family", "key", "value"), _EXPECTED, ids=[f"{one.name}-{key}" for one, key, _ in _EXPECTED])
@given(found=st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=8) | st.lists(st.booleans(), max_size=2))
@settings(max_examples=20, deadline=None)
def test_expected_values_are_the_only_ones(family: Family, key: str, value: object, found: object) -> None:
    """Absent, null and the value itself are read; all else is refused, 1 for true, too, and the key is named."""
    described = {"model_type": family.hugging_face.model_types[0]}
    for same in (described, {**described, key: None}, {**described, key: value}):
        check_expected(family, same)
    if found is not None and (type(found) is not type(value) or found != value):
        with pytest.raises(MappingError, match=f"{key} is not that of family {family.name}"):
            check_expected(family, {**described, key: found})
