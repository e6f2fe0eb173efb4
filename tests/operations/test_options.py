"""Options that an operation takes are those of a conversion, by name and type."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import anyckpt
from anyckpt.operations.keywords import ConvertWords, ReshardWords, SaveWords
from anyckpt.operations.options import ConvertOptions

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


@pytest.mark.parametrize("words", [SaveWords, ReshardWords, ConvertWords])
def test_words_that_operations_have_in_common_are_options_of_a_conversion(words: type) -> None:
    known = {each.name: each.type for each in fields(ConvertOptions)}
    assert {name: word.__forward_arg__ for name, word in words.__annotations__.items()}.items() <= known.items()


def test_a_conversion_takes_every_option() -> None:
    assert {each.name for each in fields(ConvertOptions)} <= inspect.signature(anyckpt.convert).parameters.keys()


def test_an_operation_takes_no_option_but_its_own() -> None:
    with pytest.raises(TypeError, match=r"average\(\) got an unexpected keyword argument 'quantize'"):
        anyckpt.average(["a", "b"], "c", quantize="fp8")  # type: ignore[call-arg]
