"""Flat buffers of Megatron-Core's distributed optimizer: every parameter is found where Megatron put it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import AnyckptError, MappingError
from anyckpt.formats import registry
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.optimizer.placing import Buffer, placed
from anyckpt.optimizer.read import with_optimizer
from anyckpt.optimizer.state import renamed
from anyckpt.tensor import LazyTensor, concatenate, from_array
from tests.support import expected_of, fixture_path, sha256_of

# What Megatron-Core's local layers register, by the stored names; their elements are those of the fixtures' models.
DENSE = (
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
ROUTED = (*DENSE[:5], "decoder.layers.mlp.router.weight", *DENSE[7:])
EXPERTS = (
    "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.mlp.experts.experts.linear_fc2.weight",
)
GATHERED = "optimizer.distributed.dp_group_idx_{}.param_state/shard_0_1"
BUCKET = "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0.{}"
STORED = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def opened(case: str, **config: Any) -> Checkpoint:
    checkpoint = registry.read(str(fixture_path(f"mcore/{case}/ckpt")))
    return with_optimizer(replace(checkpoint, config={**checkpoint.config, **config}))


def state_of(checkpoint: Checkpoint) -> OptimizerState:
    assert checkpoint.optimizer is not None
    return checkpoint.optimizer()


def by_hand(whole: LazyTensor, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Elements of each parameter: the last comes first, each from a multiple of 64 on."""
    flat, at, found = whole.numpy(), 0, {}
    for name in reversed(names):
        at = (at + 63) // 64 * 64
        size = int(np.prod(shapes[name]))
        found[name] = flat[at : at + size].reshape(shapes[name])
        at += size
    assert at == flat.size
    return found


def assert_same(found: Mapping[str, LazyTensor], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)


def test_buckets_of_one_tensor_each() -> None:
    """Only the pieces in the file tell that the run had local layers: its arguments do not."""
    checkpoint = opened("gpt_opt_dp_reshardable_dp2")
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights().items()}
    state = state_of(checkpoint)
    for slot, key in STORED.items():
        assert_same(state.slots[slot], by_hand(checkpoint.tensors[BUCKET.format(0, key)], DENSE, shapes))
    assert state.step == 10
    assert state.group_of["decoder.layers.mlp.linear_fc1.layer_norm_weight"] == 1
    assert state.group_of["output_layer.weight"] == 0


def test_gathered_buffers() -> None:
    checkpoint = opened("gpt_opt_dp_zero_dp2", transformer_impl="local")
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights().items()}
    (buffer,) = checkpoint.objects[GATHERED.format(0)][0].values()
    state = state_of(checkpoint)
    for slot, key in STORED.items():
        assert_same(state.slots[slot], by_hand(buffer[key], DENSE, shapes))
    assert state.step == 10


def test_gathered_buffers_of_unknown_layers_are_refused() -> None:
    """Without pieces nothing tells local layers from Transformer Engine's, which register norms elsewhere."""
    with pytest.raises(MappingError, match="nothing tells the order.*transformer_impl.*found 2 orders.*drop"):
        state_of(opened("gpt_opt_dp_zero_dp2"))


def test_experts_are_found_in_the_groups_of_expert_ranks() -> None:
    checkpoint = opened("gpt_moe_opt_chained_ep2_dp_reshardable")
    weights = checkpoint.weights()
    state = state_of(checkpoint)
    for slot, key in STORED.items():
        shapes = {name: weights[name].shape for name in ROUTED}
        dense = by_hand(checkpoint.tensors["chained_0." + BUCKET.format(0, key)], ROUTED, shapes)
        ranks = [
            by_hand(
                checkpoint.tensors["chained_1." + BUCKET.format(rank, key)],
                EXPERTS,
                {name: weights[name].shape[2:] for name in EXPERTS},
            )
            for rank in (0, 1)
        ]
        experts = {name: np.stack([ranks[0][name], ranks[1][name]])[None] for name in EXPERTS}
        assert_same(state.slots[slot], {**dense, **experts})
    assert [state.group_of[name] for name in EXPERTS] == [2, 2]


# -- the real state of two tensor-parallel ranks, put into a distributed checkpoint -----------------------------


def of_two_ranks() -> Checkpoint:
    """What a run of two tensor-parallel ranks gathered, beside the weights that its rank files hold."""
    source = fixture_path("legacy/megatron_distopt_tp2_dp2")
    ranks = registry.read(str(source))
    joined = open_checkpoint(source)
    objects: dict[str, Any] = {}
    for rank in (0, 1):
        objects[GATHERED.format(rank)] = ranks.objects[f"mp_rank_0{rank}/distrib_optim"]
        inner = ranks.objects[f"mp_rank_0{rank}/optimizer"]["optimizer"]
        objects[f"optimizer.distributed.dp_group_idx_{rank}.optimizer/shard_0_1"] = inner
    stacked = spellings.from_hub_names(joined.tensors, "megatron-core")
    return Checkpoint(
        "x", "megatron-core", stacked, dialect="megatron-core", config=joined.config, config_kind="megatron-args",
        layout=joined.layout, objects=objects,
    )  # fmt: skip


def test_state_of_tensor_parallel_ranks_is_what_was_trained() -> None:
    expected = expected_of("legacy/megatron_distopt_tp2_dp2")["optimizer"]
    state = renamed(state_of(with_optimizer(of_two_ranks())), lambda tensors: spellings.to_hub_names(tensors)[0])
    local = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    count = 0
    for slot, tensors in state.slots.items():
        for name, tensor in tensors.items():
            for fused, own in local.items():
                name = name.replace(fused, own)
            assert sha256_of(tensor) == expected[name][slot]["sha256"], (name, slot)
            count += 1
    assert count == 3 * len(expected)
    assert state.step == 7


def test_buckets_with_padding_that_the_object_tells() -> None:
    """As core 0.6 gathered them: each bucket by itself, padded, nothing between parameters."""
    checkpoint = opened("gpt_opt_dp_zero_dp2", transformer_impl="local")
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights().items()}
    expected = state_of(checkpoint).slots
    name = GATHERED.format(0)
    ((types, buffer),) = checkpoint.objects[name][0].items()
    divided = (DENSE[5:], DENSE[:5])  # the last registered come first
    table, contents = [], {key: [] for key in STORED.values()}
    for own in divided:
        size = sum(int(np.prod(shapes[one])) for one in own)
        table.append(size)
        for slot, key in STORED.items():
            parts = [expected[slot][one].numpy().reshape(-1) for one in reversed(own)]
            contents[key].append(from_array(np.concatenate([*parts, np.full(3, 9, np.float32)])))
    state = {"per_bucket_numel_unpadded": [{types: table}], 0: {types: contents}}
    older = replace(checkpoint, objects={**checkpoint.objects, name: state}, optimizer=None)
    found = state_of(with_optimizer(older)).slots
    for slot, own in expected.items():
        assert_same(found[slot], {one: tensor.numpy() for one, tensor in own.items()})
    assert buffer["numel_unpadded"] > sum(table)  # which has gaps


# -- what is refused -------------------------------------------------------------------------------------------


def refused(checkpoint: Checkpoint, words: str) -> None:
    with pytest.raises(AnyckptError, match=words):
        state_of(with_optimizer(replace(checkpoint, optimizer=None)))


def test_groups_of_another_layout() -> None:
    checkpoint = of_two_ranks()
    fewer = {name: value for name, value in checkpoint.objects.items() if "idx_1" not in name}
    refused(replace(checkpoint, objects=fewer), "has not the groups of the model's layout.*dp_group_idx_1.*1 groups")
    more = {**checkpoint.objects}
    for name, value in checkpoint.objects.items():
        more[name.replace("idx_1", "idx_2")] = value
    refused(replace(checkpoint, objects=more), "more groups than the model's layout.*expected 2 groups, found 3")


def test_buffers_that_do_not_fit() -> None:
    checkpoint = opened("gpt_opt_dp_reshardable_dp2")
    names = [BUCKET.format(0, key) for key in STORED.values()]
    short = {**checkpoint.tensors, **{name: checkpoint.tensors[name].narrow(0, 0, 959) for name in names}}
    refused(replace(checkpoint, tensors=short), "does not fit the model's parameters.*found 959 elements in 1 buckets")
    lost = {name: tensor for name, tensor in checkpoint.tensors.items() if name != names[1]}
    refused(replace(checkpoint, tensors=lost), "buckets of the distributed optimizer are missing")
    square = {**checkpoint.tensors, names[0]: checkpoint.tensors[names[0]].reshape((96, 10))}
    refused(replace(checkpoint, tensors=square), "a bucket has one axis")
    typed = {name.replace("(torch.bfloat16,", "(torch.float16,"): t for name, t in checkpoint.tensors.items()}
    refused(replace(checkpoint, tensors=typed), "element types.*expected bfloat16, found float16")


def test_objects_that_are_damaged() -> None:
    checkpoint = of_two_ranks()
    name = GATHERED.format(0)
    (types, buffer), *_ = checkpoint.objects[name][0].items()
    for value, words in (
        (3, "is not a dictionary"),
        ({}, "of a layout that is not understood"),
        ({0: {}}, "buffer of the distributed optimizer is malformed"),
        ({"buckets_coalesced": True, 0: 3}, "buffer of the distributed optimizer is malformed"),
        ({"buckets_coalesced": True, 0: {types: {**buffer, "param": None}}}, "has no whole param"),
        ({"buckets_coalesced": True, 0: {types: {**buffer, "numel_unpadded": 3}}}, "has no whole master.*expected 3"),
        ({0: {types: buffer}}, "are padded, and it does not say by how much.*--optimizer drop"),
    ):
        refused(replace(checkpoint, objects={**checkpoint.objects, name: value}), words)
    without = {key: value for key, value in checkpoint.objects.items() if "param_state" in key}
    refused(replace(checkpoint, objects=without), "has no parameter groups")


# -- placing ---------------------------------------------------------------------------------------------------


def divided(*sizes: int) -> Buffer:
    tensors: dict[int, LazyTensor] = {n: from_array(np.zeros(size, np.float32)) for n, size in enumerate(sizes)}
    return Buffer("(torch.bfloat16, torch.float32)", dict.fromkeys(STORED, tensors), divided=True)


def test_counting_restarts_in_each_bucket() -> None:
    parameters = {"a": (3, 5), "b": (7,), "c": (10,), "d": (64,)}
    assert placed(divided(74 + 54, 79), parameters, False, "x", "x") == {
        "d": (0, 0),
        "c": (0, 64),
        "b": (1, 0),
        "a": (1, 64),
    }  # the gap before b was counted to the first bucket
    assert placed(divided(74, 79), parameters, False, "x", "x")["b"] == (1, 0)
    assert placed(divided(96), parameters, False, "x", "x")["a"] == (0, 81)  # core 0.7 leaves no gaps
    for sizes in ((75, 79), (74, 78), (74, 79, 1), (64, 10, 7), (0,)):
        with pytest.raises(MappingError, match="does not fit the model's parameters"):
            placed(divided(*sizes), parameters, False, "x", "x")


def test_pieces_must_begin_and_end_with_parameters() -> None:
    parts: list[LazyTensor] = [from_array(np.zeros(size, np.float32)) for size in (10, 54, 8)]
    whole = concatenate(parts, 0)
    buffer = Buffer("(torch.bfloat16, torch.float32)", {slot: {0: whole} for slot in STORED}, divided=True)
    assert placed(buffer, {"b": (8,), "a": (10,)}, False, "x", "x") == {"a": (0, 0), "b": (0, 64)}
    with pytest.raises(MappingError, match="does not fit"):
        placed(buffer, {"b": (8,), "a": (2, 6)}, False, "x", "x")
