"""Options that an operation takes are those of a conversion, by name and type."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import anyckpt
from anyckpt.operations.options import ConvertOptions, asked

OWN = {
    "convert": {"source", "destination", "sources"},
    "reshard": {"source", "destination"},
    "average": {"sources", "destination", "weights"},
    "merge": {
        "sources",
        "destination",
        "method",
        "base",
        "weights",
        "density",
        "t",
        "scale",
        "normalize",
        "rescale",
        "seed",
        "recipe",
    },
    "merge_lora": {"base", "adapter", "destination", "scale"},
    "save": {"tensors", "destination"},
}
OTHERWISE = {
    ("average", "to"): "str | None",
    ("convert", "to"): "str | None",
    ("merge", "to"): "str | None",
    ("merge_lora", "to"): "str | None",
    ("reshard", "layout"): "LayoutRequest",
    ("save", "optimizer"): "str | None",
    ("save", "to"): "str | None",
}
"""What an operation decides itself where the user does not, or cannot do without."""


@pytest.mark.parametrize("name", OWN)
def test_what_operations_take_are_options_of_a_conversion(name: str) -> None:
    known = {each.name: each.type for each in fields(ConvertOptions)}
    taken = inspect.signature(getattr(anyckpt, name)).parameters
    for parameter in taken.keys() - OWN[name]:
        assert taken[parameter].annotation == OTHERWISE.get((name, parameter), known[parameter]), parameter


def test_what_a_function_was_given_is_asked_but_for_what_holds_instead() -> None:
    arguments = {"to": "hf", "alpha": 2.0, "dtype": "bf16", "source": "elsewhere", "memory": "1MB"}
    assert asked(arguments, alpha=None) == ConvertOptions(to="hf", dtype="bf16", memory="1MB")
