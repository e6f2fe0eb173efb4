"""Names that differ in numbers as one, and nothing lost by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint.grouping import grouped, numbers_told


def names(*listed: str) -> list[str]:
    return [group.name for group in grouped(dict.fromkeys(listed))]


def test_layers_that_are_alike_are_one() -> None:
    found = grouped({f"model.layers.{i}.mlp.up_proj.weight": ("bfloat16", (14336, 4096)) for i in range(32)})
    assert [(group.name, group.count) for group in found] == [("model.layers.{0-31}.mlp.up_proj.weight", 32)]


def test_experts_of_layers_are_one_and_first_dense_layers_are_not() -> None:
    dense = [f"layers.{i}.mlp.up.weight" for i in range(3)]
    sparse = [f"layers.{i}.mlp.experts.{e}.up.weight" for i in range(3, 61) for e in range(256)]
    assert names(*dense, *sparse) == ["layers.{0-2}.mlp.up.weight", "layers.{3-60}.mlp.experts.{0-255}.up.weight"]


def test_what_looks_otherwise_stays_apart() -> None:
    looks = {"layers.0.w": (4, 8), "layers.1.w": (4, 8), "layers.2.w": (8, 8), "layers.3.w": (4, 8)}
    assert [group.name for group in grouped(looks)] == ["layers.{0-1,3}.w", "layers.2.w"]


def test_a_number_within_a_word_is_no_layer_unless_there_are_several() -> None:
    assert names("mlp.linear_fc1.bias", "mlp.linear_fc2.bias") == ["mlp.linear_fc1.bias", "mlp.linear_fc2.bias"]
    assert names(*(f"mlp.linear_fc1.weight{i}" for i in range(8))) == ["mlp.linear_fc1.weight{0-7}"]


def test_leading_zeros_are_text() -> None:
    assert names("part.00.w", "part.01.w") == ["part.00.w", "part.01.w"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0, 1], "0-1"),
        ([0, 2], "0,2"),
        ([0, 2, 4], "0,2,4"),
        ([0, 2, 4, 6], "0,2,...,6"),
        ([0, 1, 2, 5, 8, 9], "0-2,5,8-9"),
        ([3], "3"),
    ],
)
def test_numbers_as_people_write_them(values: list[int], told: str) -> None:
    assert numbers_told(values) == told


NAMES = st.lists(
    st.lists(
        st.sampled_from(["layers", "w", "0", "1", "2", "3", "w1", "07", "experts", ""]), min_size=1, max_size=5
    ).map(".".join)
    | st.text("a0.1_9²", max_size=14),
    unique=True,
)


@given(st.dictionaries(st.sampled_from(range(3)), NAMES))
def test_groups_have_every_name_once_and_are_of_one_look(by_look: dict[int, list[str]]) -> None:
    looks = {name: look for look, listed in by_look.items() for name in listed}
    found = grouped(looks)
    listed = [list(group) for group in found]
    assert sorted(name for group in listed for name in group) == sorted(looks)
    assert all(len({looks[name] for name in group}) == 1 for group in listed)
    assert [group.count for group in found] == list(map(len, listed))
    order = list(looks)
    firsts = [min(map(order.index, group)) for group in listed]
    assert firsts == sorted(firsts)
    assert all(group.name == names[0] for group, names in zip(found, listed, strict=True) if len(names) == 1)


@pytest.mark.parametrize(("family", "most"), [("llama", 12), ("mixtral", 11), ("deepseek_v3", 23), ("t5_v1_1", 23)])
def test_a_real_model_is_a_few_lines(family: str, most: int) -> None:
    tensors = anyckpt.open(fixture_path(f"families/{family}/hf"))
    found = grouped({name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()})
    assert len(found) == most < len(tensors)
