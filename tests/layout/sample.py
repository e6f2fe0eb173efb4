"""Small models with a different number in every element, so that a wrong move shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from anyckpt.checkpoint import RankShard
from anyckpt.layout import Geometry
from anyckpt.tensor import LazyTensor, from_array

HIDDEN = 4


class Numbers:
    """Makes tensors whose elements count on."""

    def __init__(self) -> None:
        self.at = 0

    def __call__(self, *shape: int) -> LazyTensor:
        size = int(np.prod(shape))
        self.at += size
        return from_array(np.arange(self.at - size, self.at, dtype=np.int32).reshape(shape))


def dense_layer(make: Numbers, prefix: str, geometry: Geometry, ffn: int, bias: bool = False) -> dict[str, LazyTensor]:
    """A GPT layer; ``ffn`` is the width of one half if the MLP is gated."""
    assert geometry.num_attention_heads and geometry.kv_channels
    rows = geometry.query_key_value_rows(0) or 0
    fc1 = ffn * (2 if geometry.gated_linear_unit else 1)
    tensors = {
        f"{prefix}self_attention.linear_proj.weight": make(HIDDEN, geometry.num_attention_heads * geometry.kv_channels),
        f"{prefix}self_attention.linear_qkv.layer_norm_weight": make(HIDDEN),
        f"{prefix}self_attention.linear_qkv.weight": make(rows, HIDDEN),
        f"{prefix}mlp.linear_fc1.layer_norm_weight": make(HIDDEN),
        f"{prefix}mlp.linear_fc1.weight": make(fc1, HIDDEN),
        f"{prefix}mlp.linear_fc2.weight": make(HIDDEN, ffn),
    }
    if bias:
        tensors |= {
            f"{prefix}self_attention.linear_proj.bias": make(HIDDEN),
            f"{prefix}self_attention.linear_qkv.bias": make(rows),
            f"{prefix}mlp.linear_fc1.bias": make(fc1),
            f"{prefix}mlp.linear_fc2.bias": make(HIDDEN),
        }
    return tensors


def moe_layer(make: Numbers, prefix: str, geometry: Geometry, ffn: int, bias: bool = False) -> dict[str, LazyTensor]:
    """A layer with a router, experts and a shared expert."""
    fc1 = ffn * (2 if geometry.gated_linear_unit else 1)
    experts = range(geometry.num_experts or 0)
    tensors = {k: v for k, v in dense_layer(make, prefix, geometry, ffn, bias).items() if ".mlp." not in k}
    tensors |= {
        f"{prefix}pre_mlp_layernorm.weight": make(HIDDEN),
        f"{prefix}mlp.router.weight": make(len(experts), HIDDEN),
        f"{prefix}mlp.router.expert_bias": make(len(experts)),
    }
    tensors |= {f"{prefix}mlp.experts.linear_fc1.weight{e}": make(fc1, HIDDEN) for e in experts}
    if bias:
        tensors |= {f"{prefix}mlp.experts.linear_fc1.bias{e}": make(fc1) for e in experts}
    tensors |= {f"{prefix}mlp.experts.linear_fc2.weight{e}": make(HIDDEN, ffn) for e in experts}
    if bias:
        tensors |= {f"{prefix}mlp.experts.linear_fc2.bias{e}": make(HIDDEN) for e in experts}
    tensors |= {
        f"{prefix}mlp.shared_experts.linear_fc1.weight": make(fc1, HIDDEN),
        f"{prefix}mlp.shared_experts.linear_fc2.weight": make(HIDDEN, ffn),
        f"{prefix}mlp.shared_experts.gate_weight": make(1, HIDDEN),
    }
    return tensors


def mamba_layer(make: Numbers, prefix: str, geometry: Geometry, ffn: int, bias: bool = False) -> dict[str, LazyTensor]:
    """A Mamba-2 layer."""
    assert geometry.mamba
    inner, rows, convolved = geometry.mamba.inner, sum(geometry.mamba.in_proj), sum(geometry.mamba.conv1d)
    return {
        f"{prefix}mixer.dt_bias": make(geometry.mamba.num_heads),
        f"{prefix}mixer.A_log": make(geometry.mamba.num_heads),
        f"{prefix}mixer.D": make(geometry.mamba.num_heads),
        f"{prefix}mixer.in_proj.layer_norm_weight": make(HIDDEN),
        f"{prefix}mixer.in_proj.weight": make(rows, HIDDEN),
        f"{prefix}mixer.conv1d.weight": make(convolved, 1, 3),
        f"{prefix}mixer.conv1d.bias": make(convolved),
        f"{prefix}mixer.norm.weight": make(inner),
        f"{prefix}mixer.out_proj.weight": make(HIDDEN, inner),
    }


def mla_layer(make: Numbers, prefix: str, geometry: Geometry, ffn: int, bias: bool = False) -> dict[str, LazyTensor]:
    """A layer with multi-head latent attention: two up projections and two replicated down projections."""
    assert geometry.num_attention_heads
    attention = f"{prefix}self_attention."
    width = geometry.num_attention_heads * 2
    mlp = {k: v for k, v in dense_layer(make, prefix, geometry, ffn).items() if ".mlp." in k}
    return {
        f"{prefix}input_layernorm.weight": make(HIDDEN),
        f"{attention}linear_q_down_proj.weight": make(4, HIDDEN),
        f"{attention}linear_q_up_proj.layer_norm_weight": make(3),
        f"{attention}linear_q_up_proj.weight": make(width * 2, 3),
        f"{attention}linear_kv_down_proj.weight": make(8, HIDDEN),
        f"{attention}linear_kv_up_proj.layer_norm_weight": make(3),
        f"{attention}linear_kv_up_proj.weight": make(width * 3, 3),
        f"{attention}core_attention.softmax_offset": make(geometry.num_attention_heads),
        f"{attention}linear_proj.weight": make(HIDDEN, width),
        **mlp,
    }


LAYERS = {"dense": dense_layer, "moe": moe_layer, "mamba": mamba_layer, "mla": mla_layer}


def model(geometry: Geometry, kinds: Iterable[str], ffn: int, rows: int, bias: bool = False) -> dict[str, LazyTensor]:
    """A model with a layer of each of the kinds, and multi-token prediction where the geometry says so."""
    make = Numbers()
    tensors = {"embedding.word_embeddings.weight": make(rows, HIDDEN)}
    if bias:
        tensors["embedding.position_embeddings.weight"] = make(7, HIDDEN)
    for number, kind in enumerate(kinds):
        tensors |= LAYERS[kind](make, f"decoder.layers.{number}.", geometry, ffn, bias)
    tensors["decoder.final_layernorm.weight"] = make(HIDDEN)
    for number in range(geometry.mtp_num_layers or 0):
        tensors |= {
            f"mtp.layers.{number}.enorm.weight": make(HIDDEN),
            f"mtp.layers.{number}.hnorm.weight": make(HIDDEN),
            f"mtp.layers.{number}.eh_proj.weight": make(HIDDEN * 4, 2 * HIDDEN),
            f"mtp.layers.{number}.final_layernorm.weight": make(HIDDEN),
        }
        tensors |= dense_layer(make, f"mtp.layers.{number}.transformer_layer.", geometry, ffn)
    if not geometry.share_embeddings_and_output_weights:
        tensors["output_layer.weight"] = make(rows, HIDDEN)
    return tensors


def assert_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    """The same names with the same elements."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)


def assert_shards_equal(found: Iterable[RankShard], expected: Iterable[RankShard]) -> None:
    """The same ranks with the same tensors."""
    ours, theirs = ({rank_of(shard): shard for shard in shards} for shards in (found, expected))
    assert sorted(ours) == sorted(theirs)
    for rank, shard in theirs.items():
        assert_equal(ours[rank].tensors, shard.tensors)


def rank_of(shard: RankShard) -> tuple[int, int, int, int]:
    return shard.tensor_rank, shard.pipeline_rank, shard.virtual_rank, shard.expert_rank
