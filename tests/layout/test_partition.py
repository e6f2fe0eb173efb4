"""Every parameter's kind, by name; and what a user's rules add."""

from __future__ import annotations

import numpy as np
import pytest

from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Mamba, Parallelism, cut, join
from anyckpt.layout.partition import KINDS, Rules
from anyckpt.tensor import LazyTensor
from tests.layout.sample import Numbers, assert_equal

L = "decoder.layers.3."
A = f"{L}self_attention."

KNOWN = {
    "column": [
        f"{A}linear_q_proj.weight",
        f"{A}linear_q_up_proj.weight",
        f"{A}linear_kv_up_proj.weight",
        f"{L}cross_attention.linear_q.weight",
        f"{L}cross_attention.linear_q.bias",
        f"{L}cross_attention.linear_kv.weight",
        f"{A}core_attention.softmax_offset",
        "mtp.layers.0.eh_proj.weight",
        f"{L}mixer.A_log",
        f"{L}mixer.D",
        f"{L}mixer.dt_bias",
        f"{L}mixer.norm.weight",
        f"{A}linear_qkv.adapter.linear_in.weight",
        f"{A}linear_qkv.adapter.linear_out.weight",
        f"{A}linear_qkv.adapter.weight_magnitude",
        f"{A}linear_qkv.adapter.adapter_q.linear_in.weight",
        f"{L}mlp.linear_fc1.adapter.linear_in.weight",
        f"{L}mlp.linear_fc1.adapter.adapter_gate.linear_out.weight",
        f"{A}linear_proj.adapter.linear_out.weight",
        f"{A}adapter_layer.lora_kqv_adapter.linear_in.weight",
        f"{A}adapter_layer.lora_dense_attention_adapter.linear_out.weight",
        f"{A}adapter_layer.lora_unfused_kqv_adapter.q_adapter.linear_out.weight",
        f"{L}mlp.adapter_layer.lora_hto4h_adapter.linear_in.weight",
    ],
    "row": [
        f"{A}linear_proj.weight",
        "encoder.layers.0.mlp.linear_fc2.weight",
        f"{L}mlp.shared_experts.linear_fc2.weight",
        f"{L}mixer.out_proj.weight",
        f"{A}linear_proj.adapter.linear_in.weight",
        f"{L}mlp.linear_fc2.adapter.linear_in.weight",
        f"{A}adapter_layer.lora_dense_attention_adapter.linear_in.weight",
        f"{L}mlp.adapter_layer.lora_4htoh_adapter.linear_in.weight",
        f"{A}linear_proj.to_wrap.weight",
    ],
    "qkv": [f"{A}linear_qkv.weight", f"{A}linear_qkv.bias", f"{A}linear_qkv.to_wrap.weight"],
    "gate-up": [
        f"{L}mlp.linear_fc1.weight",
        f"{L}mlp.linear_fc1.bias",
        f"{L}mlp.shared_experts.linear_fc1.weight",
        "mtp.layers.0.transformer_layer.mlp.linear_fc1.weight",
        "mtp.layers.0.mtp_model_layer.mlp.linear_fc1.weight",
        f"{L}mlp.linear_fc1.adapter.linear_out.weight",
        f"{L}mlp.linear_fc1.adapter.weight_magnitude",
        f"{L}mlp.adapter_layer.lora_hto4h_adapter.linear_out.weight",
    ],
    "vocabulary": [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "output_layer.bias",
        "lm_head.bias",
        "lm_head.output_layer.bias",
    ],
    "replicated": [
        "embedding.position_embeddings.weight",
        "embedding.tokentype_embeddings.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_norm.weight",
        "encoder.final_layernorm.bias",
        f"{A}linear_proj.bias",
        f"{L}mlp.linear_fc2.bias",
        f"{A}linear_qkv.layer_norm_weight",
        f"{L}mlp.linear_fc1.layer_norm_bias",
        f"{L}input_layernorm.weight",
        f"{L}pre_mlp_layernorm.weight",
        f"{L}pre_cross_attn_layernorm.weight",
        f"{A}q_layernorm.weight",
        f"{A}k_layernorm.weight",
        f"{A}linear_qkv_down_proj.weight",
        f"{A}linear_kv_up_proj.layer_norm_weight",
        f"{A}linear_proj.post_layernorm.weight",
        f"{L}mlp.router.weight",
        f"{L}mlp.router.bias",
        f"{L}mlp.router.expert_bias",
        f"{L}mlp.shared_experts.gate_weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.final_layernorm.weight",
        "decoder.layers.0.norm.weight",
        f"{L}mixer.in_proj.layer_norm_weight",
        "lm_head.dense.weight",
        "lm_head.layer_norm.bias",
        "binary_head.weight",
        "pooler.dense.bias",
        "encoder_relative_pos_emb.relative_attention_bias.weight",
        f"{A}linear_proj.adapter.weight_magnitude",
        "class_token",
        "conv1.weight",
        "position_embeddings.weight",
        "ln_pre.bias",
        "encoder.initial_layernorm.weight",
    ],
    "latent-down": [f"{A}linear_q_down_proj.weight", f"{A}linear_kv_down_proj.weight"],
    "mamba-in": [f"{L}mixer.in_proj.weight"],
    "mamba-conv": [
        f"{L}mixer.conv1d.weight",
        f"{L}mixer.conv1d.bias",
        f"{L}mixer.conv1d_weight",
        f"{L}mixer.conv1d_bias",
    ],
    "dropped": [f"{A}linear_qkv._extra_state", f"{L}mlp.experts.linear_fc1._extra_state0", "rotary_pos_emb.inv_freq"],
}


@pytest.mark.parametrize("kind", KNOWN)
def test_kinds_go_by_name(kind: str) -> None:
    rules = Rules()
    for name in KNOWN[kind]:
        found = rules.kind(name)
        assert found is not None and found.name == kind, name


@pytest.mark.parametrize(
    "name",
    [
        f"{L}mlp.experts.linear_fc1.weight",  # stacked experts: which axis counts them is not in the name
        f"{L}mlp.linear_fc1.scale",
        f"{L}mlp.linear_fc1.weight.amax",
        "embedding.word_embeddings.weight2",
        "model.layers.0.self_attn.q_proj.weight",
        "xoutput_layer.weight",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert Rules().kind(name) is None


def test_unknown_names_are_listed_and_the_message_shows_a_rule() -> None:
    make = Numbers()
    tensors = {f"decoder.layers.{i}.strange.weight": make(2, 2) for i in range(12)}
    with pytest.raises(MappingError) as caught:
        cut(tensors, Parallelism(tensor_parallel=2), Geometry(num_layers=12))
    text = str(caught.value)
    assert "decoder.layers.0.strange.weight, decoder.layers.1.strange.weight" in text
    assert "and 2 more" in text
    assert '"decoder.layers.*.strange.weight: column"' in text
    assert all(kind in text for kind in KINDS)


def test_a_users_rules_come_first() -> None:
    make = Numbers()
    tensors = {
        "my.embed": make(5, 4),
        "my.layers.0.blocks": make(6, 2),
        "my.layers.0.out": make(3, 4),
        "output_layer.bias": make(3),
    }
    rules = {
        "my.embed": "vocabulary",
        "my.layers.*.blocks": "blocks: 2,4",
        "**.out": "row",
        "output_layer.bias": "replicated",
    }
    geometry = Geometry(vocab_size=5, make_vocab_size_divisible_by=2)
    layout = Parallelism(tensor_parallel=2)
    shards = cut(tensors, layout, geometry, rules=rules)
    assert shards[1].tensors["my.layers.0.blocks"].numpy()[:, 0].tolist() == [22, 28, 30]  # row 1, then rows 4 and 5
    assert shards[0].tensors["my.embed"].shape == (4, 4)
    assert shards[1].tensors["output_layer.bias"].shape == (3,)
    assert_equal(join(shards, layout, geometry, rules=rules).tensors, tensors)


@pytest.mark.parametrize("text", ["colum", "column@middle", "blocks:", "blocks:1,", "blocks:0,2", "", "blocks:1,-1", 3])
def test_rules_that_say_nothing_are_refused(text: object) -> None:
    with pytest.raises(UsageError, match=r"partition rule for 'a\.\*'.*one of column, row"):
        Rules({"a.*": text})  # type: ignore[dict-item]


def test_a_rule_outside_layers_must_say_the_stage() -> None:
    make = Numbers()
    tensors = {
        "decoder.layers.0.mlp.linear_fc2.weight": make(2, 2),
        "decoder.layers.1.mlp.linear_fc2.weight": make(2, 2),
    }
    tensors["tail.weight"] = make(2, 2)
    layout, geometry = Parallelism(pipeline_parallel=2), Geometry(num_layers=2)
    with pytest.raises(UsageError, match=r"which pipeline stage.*tail\.weight.*@first"):
        cut(tensors, layout, geometry, rules={"tail.weight": "column"})
    shards = cut(tensors, layout, geometry, rules={"tail.weight": "column@last"})
    assert ["tail.weight" in shard.tensors for shard in shards] == [False, True]
    everywhere = cut(tensors, layout, geometry, rules={"tail.weight": "column@all"})
    joined = join(everywhere, layout, geometry, rules={"tail.weight": "column@all"})
    assert_equal(joined.tensors, tensors)


def split(name: str, tensor: LazyTensor, ways: int, **facts: object) -> None:
    cut({name: tensor}, Parallelism(tensor_parallel=ways), Geometry(**facts), complete=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "facts", "message"),
    [
        ("decoder.layers.0.mlp.linear_fc2.weight", (4, 6), {}, "multiple of 4, found a length of 6"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (4,), {}, r"at least 2 axes, found \(4,\)"),
        (
            "decoder.layers.0.mlp.linear_fc1.weight",
            (12, 1),
            {"gated_linear_unit": True},
            "multiple of 4, found a length of 6",
        ),
        (
            "decoder.layers.0.mlp.linear_fc1.weight",
            (3, 1),
            {"gated_linear_unit": True},
            "multiple of 2, found a length of 3",
        ),
        ("decoder.layers.0.mixer.in_proj.weight", (8, 1), {}, "sizes of the model's Mamba layers are not known"),
        (
            "decoder.layers.0.mixer.in_proj.weight",
            (8, 1),
            {"mamba": Mamba(4, 2, 4, 3)},
            "44 rows by the conf.*8 rows in all",
        ),
        (
            "decoder.layers.0.mixer.conv1d.bias",
            (20,),
            {"mamba": Mamba(4, 2, 2, 3)},
            "heads and groups in multiples of 4, found 4 heads in 2 groups",
        ),
        (
            "decoder.layers.0.self_attention.linear_qkv.weight",
            (16, 1),
            {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 2},
            "24 rows by the conf.*16 rows in all",
        ),
        (
            "decoder.layers.0.self_attention.linear_qkv.weight",
            (16, 1),
            {"num_query_groups": 3},
            "4 ranks to divide the groups, or the groups the ranks, found 3 query groups",
        ),
        (
            "embedding.word_embeddings.weight",
            (8, 1),
            {"vocab_size": 9},
            "larger than the stored rows.*at least 9 rows, found 8",
        ),
        (
            "embedding.word_embeddings.weight",
            (8, 1),
            {"padded_vocab_size": 6},
            "at least 8 rows, a multiple of.* 4, found 6",
        ),
        (
            "embedding.word_embeddings.weight",
            (8, 1),
            {"padded_vocab_size": 10},
            "at least 8 rows, a multiple of.* 4, found 10",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    name: str, shape: tuple[int, ...], facts: dict[str, object], message: str
) -> None:
    with pytest.raises(MappingError, match=message):
        split(name, Numbers()(*shape), 4, **facts)


def test_what_is_dropped_is_not_written() -> None:
    make = Numbers()
    tensors = {"output_layer.weight": make(4, 2), "output_layer._extra_state": make(3)}
    shards = cut(tensors, Parallelism(), Geometry(make_vocab_size_divisible_by=1))
    assert list(shards[0].tensors) == ["output_layer.weight"]
    np.testing.assert_array_equal(
        shards[0].tensors["output_layer.weight"].numpy(), tensors["output_layer.weight"].numpy()
    )
