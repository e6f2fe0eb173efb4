"""Models that Megatron-Core wrote, cut for any two layouts one after the other: joining gives them back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from anyckpt.errors import UsageError
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.pipeline import chunks
from anyckpt.tensor import LazyTensor
from tests.layout.sample import assert_equal, assert_shards_equal
from tests.layout.test_fixtures import described, stored

DENSE = ["megatron_gpt_tp2_pp2", "megatron_gpt_tp2_pp2_vpp2", "megatron_gpt_tp1_pp1_release"]
UNEVEN = ["megatron_gpt_pp3_uneven", "megatron_gpt_pp2_account_emb_loss", "megatron_gpt_pp2_vpp2_layout"]
EXPERTS = ["megatron_moe_tp2_ep2", "megatron_moe_pp2_ep2_etp1"]


@cache
def model(case: str) -> tuple[dict[str, LazyTensor], Geometry]:
    """The whole model of a fixture."""
    parallelism, geometry = described(case)
    return join(stored(case, parallelism), parallelism, geometry).tensors, geometry


@st.composite
def parallelisms(draw: st.DrawFn, geometry: Geometry) -> Parallelism:
    """A layout that the model can have."""
    layers = geometry.num_layers or 0
    stages = draw(st.sampled_from([1, 2, 3, 4]))
    virtual = draw(st.sampled_from([1, 1, 2, 3, 4])) if stages > 1 else 1
    number = st.none() | st.integers(0, layers)
    tensor = draw(st.sampled_from([1, 2, 4]))
    sizes = Parallelism(tensor, stages, virtual)
    if geometry.num_experts is not None:
        expert, expert_tensor = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([None, 1, 2, 4]))
        spread = replace(sizes, expert_parallel=expert, expert_tensor_parallel=expert_tensor)
        with suppress(UsageError):
            spread.check()
            sizes = spread
    ways = {
        "even": sizes,
        "uneven": replace(
            sizes, num_layers_in_first_pipeline_stage=draw(number), num_layers_in_last_pipeline_stage=draw(number)
        ),
        "accounting": replace(sizes, account_for_embedding=draw(st.booleans()), account_for_loss=draw(st.booleans())),
    }
    places = st.integers(0, layers)
    cuts = sorted(draw(st.lists(places, min_size=stages * virtual - 1, max_size=stages * virtual - 1)))
    counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]
    words = "E" + "|".join("t" * count for count in counts) + "L"
    possible = {"layout": replace(sizes, pipeline_layout=words)}
    for how, way in ways.items():
        with suppress(UsageError):
            chunks(way, {"decoder": layers})
            possible[how] = way
    how = draw(st.sampled_from(sorted(possible)))
    event(f"{how}, {stages} stages of {virtual}")
    return possible[how]


@pytest.mark.parametrize("case", [*DENSE, *UNEVEN, *EXPERTS])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_cut_for_one_layout_and_then_another(case: str, data: st.DataObject) -> None:
    whole, geometry = model(case)
    first, second = data.draw(parallelisms(geometry)), data.draw(parallelisms(geometry))
    padding = data.draw(st.sampled_from(["zeros", "repeat-last-row"]))
    spelling = data.draw(st.sampled_from(["grouped", "sequential", "legacy-grouped"]))
    true = data.draw(st.sampled_from([None, 61, 64]))
    wanted = Geometry(**{**vars(geometry), "vocab_size": true, "padded_vocab_size": None})
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    trimmed = {
        name: tensor.narrow(0, 0, true) if true and name in vocabulary else tensor for name, tensor in whole.items()
    }
    tensors = trimmed
    for layout in (first, second):
        shards = cut(tensors, layout, wanted, padding=padding, spelling=spelling)
        joined = join(shards, layout, wanted, verify_replicas=True)
        assert not joined.warnings
        assert_equal(joined.tensors, trimmed)
        tensors = joined.tensors
    if true is None:
        parallelism, own = described(case)
        assert_shards_equal(cut(tensors, parallelism, own), cut(whole, parallelism, own))
