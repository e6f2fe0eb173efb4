"""Cutting and joining undo each other for every geometry and layout, and do what independent arithmetic does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from anyckpt.layout import Geometry, Latent, Mamba, Parallelism, cut, join
from anyckpt.tensor import LazyTensor
from tests.layout.sample import Numbers, assert_equal, assert_shards_equal, dense_layer, model

_SIZES = st.sampled_from([1, 2, 4])


@dataclass(frozen=True)
class Case:
    tensors: dict[str, LazyTensor]
    geometry: Geometry
    parallelism: Parallelism
    padding: str
    spelling: str


@st.composite
def pipelines(draw: st.DrawFn, mtp: int) -> tuple[int, Parallelism]:
    """A number of layers and a way to lay them out; sizes other than the pipeline's are filled in later."""
    stages = draw(st.sampled_from([1, 2, 3]))
    virtual = draw(st.sampled_from([1, 1, 2, 3])) if stages > 1 else 1
    each = draw(st.integers(1, 2)) * virtual
    how = draw(st.sampled_from(["even", "uneven", "accounting", "layout"]))
    event(how)
    layout = Parallelism(pipeline_parallel=stages, virtual_pipeline=virtual)
    if how == "uneven" and stages > 1:
        first = draw(st.none() | st.integers(0, 2).map(lambda n: n * virtual))
        last = draw(st.integers(0, 2).map(lambda n: n * virtual))
        middle = stages - 1 - (first is not None)
        total = (first or 0) + last + middle * each
        return total, dataclasses.replace(
            layout, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last
        )
    if how == "accounting":
        embedding, loss = draw(st.booleans()), draw(st.booleans())
        each = max(each, 2 * virtual)
        changed = dataclasses.replace(layout, account_for_embedding=embedding, account_for_loss=loss)
        return each * stages - embedding - loss, changed
    if how == "layout":
        counts = draw(st.lists(st.integers(0, 2), min_size=stages * virtual, max_size=stages * virtual))
        words = ["t" * count for count in counts]
        words[0] = "E" + words[0]
        last = max((i for i, count in enumerate(counts) if count), default=0)
        free = [i for i in range(last, len(words)) if i // stages == virtual - 1 and (i % stages or stages == 1)]
        words[draw(st.sampled_from(free)) if free else -1] += "m" * mtp
        words[-1] += "L"
        return sum(counts), dataclasses.replace(layout, pipeline_layout="|".join(words))
    return each * stages, layout


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mtp = draw(st.sampled_from([0, 0, 1, 2]))
    layers, layout = draw(pipelines(mtp))
    tensor_parallel, expert_parallel = draw(_SIZES), draw(_SIZES)
    kinds = draw(st.lists(st.sampled_from(["dense", "moe", "mamba", "mla"]), min_size=layers, max_size=layers))
    etp = draw(st.sampled_from([None, *(n for n in (1, 2, 4) if tensor_parallel % n == 0)]))
    groups = draw(st.sampled_from([1, 2, 4]))
    vocabulary = draw(st.integers(1, 20))
    geometry = Geometry(
        num_layers=layers,
        mtp_num_layers=mtp or None,
        num_attention_heads=4,
        num_query_groups=groups,
        kv_channels=4,
        attention_output_gate=draw(st.booleans()),
        gated_linear_unit=draw(st.booleans()),
        num_experts=8 if "moe" in kinds else None,
        share_embeddings_and_output_weights=draw(st.booleans()),
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=draw(st.sampled_from([1, 3, 8])),
        mamba=Mamba(num_heads=4, head_dim=2, num_groups=4, state_dim=3),
        latent=draw(st.sampled_from([None, Latent(4, 6, 2), Latent(4, 6, 2, down_parallel=True)])),
    )
    parallelism = dataclasses.replace(
        layout,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel if "moe" in kinds else 1,
        expert_tensor_parallel=etp,
    )
    bias = draw(st.booleans())
    event(f"{parallelism.pipeline_parallel} stages of {parallelism.virtual_pipeline}")
    return Case(
        tensors=model(geometry, kinds, ffn=4, rows=vocabulary, bias=bias),
        geometry=geometry,
        parallelism=parallelism,
        padding=draw(st.sampled_from(["zeros", "repeat-last-row"])),
        spelling=draw(st.sampled_from(["grouped", "sequential"] + ["legacy-grouped"] * (not bias))),
    )


@given(cases())
@settings(max_examples=80, deadline=None)
def test_joining_undoes_cutting_and_the_other_way_round(case: Case) -> None:
    shards = cut(
        case.tensors, case.parallelism, case.geometry, padding=case.padding, spelling=case.spelling  # type: ignore[arg-type]
    )  # fmt: skip
    joined = join(shards, case.parallelism, case.geometry, verify_replicas=True)
    assert not joined.warnings
    assert_equal(joined.tensors, case.tensors)
    again = cut(
        joined.tensors, case.parallelism, case.geometry, padding=case.padding, spelling=case.spelling  # type: ignore[arg-type]
    )  # fmt: skip
    assert_shards_equal(again, shards)


@given(cases(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_layout_may_lie_between(case: Case, data: st.DataObject) -> None:
    """From one layout to another and back; nothing is read until the end."""
    between = Parallelism(
        tensor_parallel=data.draw(_SIZES), expert_parallel=data.draw(_SIZES) if case.geometry.num_experts else 1
    )
    first = join(cut(case.tensors, case.parallelism, case.geometry), case.parallelism, case.geometry)
    second = join(cut(first.tensors, between, case.geometry), between, case.geometry)
    assert_equal(second.tensors, case.tensors)


def test_each_ranks_part_is_what_independent_arithmetic_gives() -> None:
    mamba = Mamba(num_heads=4, head_dim=2, num_groups=2, state_dim=3)
    geometry = Geometry(
        num_layers=2, num_attention_heads=4, num_query_groups=2, kv_channels=4, gated_linear_unit=True, mamba=mamba,
        make_vocab_size_divisible_by=3,
    )  # fmt: skip
    tensors = model(geometry, ["dense", "mamba"], ffn=6, rows=10, bias=True)
    whole = {name: tensor.numpy() for name, tensor in tensors.items()}
    shards = cut(tensors, Parallelism(tensor_parallel=2), geometry, padding="repeat-last-row")
    for rank, shard in enumerate(shards):
        part = {name: tensor.numpy() for name, tensor in shard.tensors.items()}
        fc1 = whole["decoder.layers.0.mlp.linear_fc1.weight"]
        gate, up = fc1[:6], fc1[6:]
        expected = np.concatenate([gate[3 * rank : 3 * rank + 3], up[3 * rank : 3 * rank + 3]])
        np.testing.assert_array_equal(part["decoder.layers.0.mlp.linear_fc1.weight"], expected)
        fc2 = whole["decoder.layers.0.mlp.linear_fc2.weight"]
        np.testing.assert_array_equal(part["decoder.layers.0.mlp.linear_fc2.weight"], np.split(fc2, 2, axis=1)[rank])
        np.testing.assert_array_equal(
            part["decoder.layers.0.mlp.linear_fc2.bias"], whole["decoder.layers.0.mlp.linear_fc2.bias"]
        )
        qkv = whole["decoder.layers.0.self_attention.linear_qkv.weight"]
        np.testing.assert_array_equal(part["decoder.layers.0.self_attention.linear_qkv.weight"], np.split(qkv, 2)[rank])
        embedding = whole["embedding.word_embeddings.weight"]
        padded = np.concatenate([embedding, embedding[-1:], embedding[-1:]])
        np.testing.assert_array_equal(part["embedding.word_embeddings.weight"], padded[6 * rank : 6 * rank + 6])
        z, x, b, c, dt = np.split(whole["decoder.layers.1.mixer.in_proj.weight"], np.cumsum([8, 8, 6, 6]))
        expected = np.concatenate([np.split(block, 2)[rank] for block in (z, x, b, c, dt)])
        np.testing.assert_array_equal(part["decoder.layers.1.mixer.in_proj.weight"], expected)
        x, b, c = np.split(whole["decoder.layers.1.mixer.conv1d.weight"], [8, 14])
        expected = np.concatenate([np.split(block, 2)[rank] for block in (x, b, c)])
        np.testing.assert_array_equal(part["decoder.layers.1.mixer.conv1d.weight"], expected)


def test_fewer_query_groups_than_ranks_are_cut_as_raw_rows() -> None:
    geometry = Geometry(num_layers=1, num_attention_heads=4, num_query_groups=1, kv_channels=4)
    tensors = model(geometry, ["dense"], ffn=4, rows=8)
    shards = cut(tensors, Parallelism(tensor_parallel=4), geometry)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    parts = [shard.tensors[name].numpy() for shard in shards]
    np.testing.assert_array_equal(np.concatenate(parts), tensors[name].numpy())
    assert parts[0].shape[0] == 6  # 24 rows over 4 ranks: a head and a half each, so the first has no key


def test_padding_rows_that_a_vocabulary_has_are_kept() -> None:
    geometry = Geometry(
        num_layers=0, vocab_size=5, make_vocab_size_divisible_by=4, share_embeddings_and_output_weights=True
    )
    tensors = model(geometry, [], ffn=4, rows=8)
    shards = cut(tensors, Parallelism(tensor_parallel=2), geometry)
    found = np.concatenate([shard.tensors["embedding.word_embeddings.weight"].numpy() for shard in shards])
    np.testing.assert_array_equal(found, tensors["embedding.word_embeddings.weight"].numpy())
    wider = cut(tensors, Parallelism(tensor_parallel=4), geometry)
    found = np.concatenate([shard.tensors["embedding.word_embeddings.weight"].numpy() for shard in wider])
    assert found.shape[0] == 16
    assert (found[8:] == 0).all() and found[7].all()


def test_padding_rows_that_a_layout_does_not_need_are_dropped() -> None:
    geometry = Geometry(
        num_layers=0, vocab_size=5, make_vocab_size_divisible_by=4, share_embeddings_and_output_weights=True
    )
    tensors = model(geometry, [], ffn=4, rows=16)
    (shard,) = cut(tensors, Parallelism(), geometry)
    name = "embedding.word_embeddings.weight"
    np.testing.assert_array_equal(shard.tensors[name].numpy(), tensors[name].numpy()[:8])


def test_rows_stay_as_stored_where_the_true_vocabulary_is_unknown() -> None:
    geometry = Geometry(num_layers=0, share_embeddings_and_output_weights=True)
    tensors = model(geometry, [], ffn=4, rows=256)
    layout = Parallelism(tensor_parallel=2)
    assert_equal(join(cut(tensors, layout, geometry), layout, geometry).tensors, tensors)


def encoder_layers(make: Numbers, stack: str, count: int, cross: bool = False) -> dict[str, LazyTensor]:
    geometry = Geometry(num_attention_heads=4, num_query_groups=4, kv_channels=2)
    tensors: dict[str, LazyTensor] = {}
    for layer in range(count):
        prefix = f"{stack}.layers.{layer}."
        tensors |= dense_layer(make, prefix, geometry, ffn=4, bias=True)
        if cross:
            tensors |= {
                f"{prefix}pre_cross_attn_layernorm.weight": make(4),
                f"{prefix}cross_attention.linear_q.weight": make(8, 4),
                f"{prefix}cross_attention.linear_kv.weight": make(16, 4),
                f"{prefix}cross_attention.linear_kv.bias": make(16),
                f"{prefix}cross_attention.linear_proj.weight": make(4, 8),
                f"{prefix}cross_attention.linear_proj.bias": make(4),
            }
    return tensors


@pytest.mark.parametrize("layout", [Parallelism(2), Parallelism(4, 2), Parallelism(2, 2, 2)], ids=str)
def test_an_encoder_with_heads(layout: Parallelism) -> None:
    """BERT: heads and pooler are on the last stage, and so is the copy of the embedding."""
    make = Numbers()
    tensors = {
        "embedding.word_embeddings.weight": make(8, 4),
        "embedding.position_embeddings.weight": make(5, 4),
        "embedding.tokentype_embeddings.weight": make(2, 4),
        **encoder_layers(make, "encoder", 4),
        "encoder.final_layernorm.weight": make(4),
        "lm_head.dense.weight": make(4, 4),
        "lm_head.layer_norm.bias": make(4),
        "output_layer.bias": make(8),
        "binary_head.weight": make(2, 4),
        "pooler.dense.bias": make(4),
    }
    geometry = Geometry(
        num_layers=4, share_embeddings_and_output_weights=True, vocab_size=8, make_vocab_size_divisible_by=3
    )
    shards = cut(tensors, layout, geometry)
    last = {name for name in shards[-1].tensors if "encoder.layers" not in name}
    if layout.pipeline_parallel > 1:
        assert last == {
            *("encoder.final_layernorm.weight", "lm_head.dense.weight", "lm_head.layer_norm.bias"),
            *("output_layer.bias", "binary_head.weight", "pooler.dense.bias", "output_layer.weight"),
        }
    joined = join(shards, layout, geometry, verify_replicas=True)
    assert_equal(joined.tensors, tensors)


@pytest.mark.parametrize("layout", [Parallelism(2), Parallelism(2, 3, pipeline_split_rank=1)], ids=str)
def test_an_encoder_with_a_decoder(layout: Parallelism) -> None:
    """T5: the first decoder stage and the head have copies of the embedding, every stage the relative positions."""
    make = Numbers()
    tensors = {
        "embedding.word_embeddings.weight": make(8, 4),
        "encoder_relative_pos_emb.relative_attention_bias.weight": make(3, 4),
        "decoder_relative_pos_emb.relative_attention_bias.weight": make(3, 4),
        **encoder_layers(make, "encoder", 2),
        "encoder.final_layernorm.weight": make(4),
        **encoder_layers(make, "decoder", 4, cross=True),
        "decoder.final_layernorm.weight": make(4),
        "lm_head.output_layer.bias": make(8),
    }
    geometry = Geometry(
        num_layers=4, encoder_num_layers=2, vocab_size=8, make_vocab_size_divisible_by=1,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    shards = cut(tensors, layout, geometry)
    if layout.pipeline_parallel > 1:
        assert "lm_head.output_layer.weight" in shards[-1].tensors
        has = [shard.pipeline_rank for shard in shards if "embedding.word_embeddings.weight" in shard.tensors]
        assert has == [0, 0, 1, 1]
        assert all("encoder_relative_pos_emb.relative_attention_bias.weight" in shard.tensors for shard in shards)
    joined = join(shards, layout, geometry, verify_replicas=True)
    assert not joined.warnings
    assert_equal(joined.tensors, tensors)
