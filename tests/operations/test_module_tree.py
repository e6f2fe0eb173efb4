"""Trees of modules lose nothing, and what is looked for in training state is found in any."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.operations.steps.module_tree import Leaf, Module, module_tree
from anyckpt.operations.steps.training_facts import learning_rates, loss_scale

WORDS = st.sampled_from(["layers", "0", "1", "2", "10", "w", "w0", "w1", "w2", "", "experts"])
NAMES = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
LEAVES = st.dictionaries(NAMES, st.tuples(st.integers(0, 3), st.booleans()))


def checked(module: Module) -> None:
    own = module.tensors - sum(inner.tensors for inner in module.modules)
    assert own >= 0 and (own > 0) == bool(module.look)
    assert all(inner.tensors % inner.count == 0 and inner.nbytes % inner.count == 0 for inner in module.modules)
    for inner in module.modules:
        checked(inner)


@given(LEAVES)
def test_a_tree_has_every_tensor_once(sizes: dict[str, tuple[int, bool]]) -> None:
    leaves = [
        Leaf(name, f"int8 [{size}]", 0 if tied else size, 0 if tied else size) for name, (size, tied) in sizes.items()
    ]
    tree = module_tree(leaves)
    assert tree.tensors == len(leaves)
    assert tree.nbytes == tree.elements == sum(leaf.nbytes for leaf in leaves)
    checked(tree)


def test_a_name_of_a_thousand_words_is_no_trouble() -> None:
    assert module_tree([Leaf(".".join("ab" * 1000), "int8 [1]", 1, 1)]).tensors == 1


def test_experts_of_some_layers_are_told_with_their_layers() -> None:
    names = [f"layers.{i}.attention.w" for i in range(6)] + [
        f"layers.{i}.experts.{e}.w" for i in (1, 3, 5) for e in range(4)
    ]
    (layers,) = module_tree(Leaf(name, "int8 [2]", 2, 2) for name in names).modules
    assert [(inner.name, inner.count, inner.nbytes) for inner in layers.modules] == [
        ("{0,2,4}.attention.w", 3, 6),
        ("{1,3,5}", 3, 30),
    ]


OBJECTS = st.recursive(
    st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["lr", "param_groups", "scale", "growth_tracker", "_last_lr", "cur_scale"]), inner
        )
    ),
    max_leaves=30,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=4), OBJECTS))
def test_any_state_is_looked_through(objects: dict[str, Any]) -> None:
    assert all(math.isfinite(rate) for rate in learning_rates(objects))
    scale = loss_scale(objects)
    assert scale is None or math.isfinite(scale)


def test_state_that_contains_itself_ends() -> None:
    state: dict[str, Any] = {"param_groups": [{"lr": 0.5}]}
    state["self"] = state["again"] = [state, state]
    assert learning_rates({"optimizer": state}) == [0.5]
    assert loss_scale({"optimizer": state}) is None
