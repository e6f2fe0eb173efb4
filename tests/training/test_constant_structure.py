"""Saves that take an earlier one's plan have their own contents, names and nesting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

import anyckpt.torch  # noqa: E402

W = torch.arange(12.0).reshape(3, 4)
CHANGED: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {
    "an object's value": ({"w": W, "step": 1, "lr": 0.1}, {"w": W + 1, "step": 2, "lr": 0.2}),
    "an object's name": ({"w": W, "lr": 1}, {"w": W, "ab": 1}),
    "objects' order": ({"w": W, "lr": 1, "xx": 2}, {"w": W, "xx": 1, "lr": 2}),
    "an object's nesting": ({"w": W, "a": {"b": 1}}, {"w": W, "a.b": 1}),
    "a tensor's nesting": ({"a": {"b": W}}, {"a.b": W + 1}),
    "a list for a dictionary": ({"a": [W]}, {"a": {"0": W + 1}}),
    "a tensor's name": ({"a": W, "b": W + 1}, {"a": W + 2, "c": W + 3}),
    "a tensor's type": ({"a": W.half()}, {"a": W.bfloat16()}),
    "a tensor for an object": ({"a": W, "o": 5}, {"a": W, "o": W}),
    "an object that goes": ({"a": W, "o": 1}, {"a": W}),
}


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("form", ["dcp", "torch"])
@pytest.mark.parametrize("what", CHANGED)
def test_a_plan_that_is_used_again_says_what_is_saved(what: str, form: str, tmp_path: Path) -> None:
    """Contents, names and nesting are those of the save, whatever the save before had."""
    states = [*CHANGED[what], CHANGED[what][0]]
    name = "s{step}.pt" if form == "torch" else "s{step}"
    with anyckpt.torch.Saver(tmp_path / "run", format=form, name=name, assume_constant_structure=True) as saver:
        paths = [saver.save(state, step) for step, state in enumerate(states)]
    for path, state in zip(paths, states, strict=True):
        assert alike(anyckpt.torch.load(path), state)
        if form == "torch":
            assert alike(torch.load(path, weights_only=True), state)
