"""Names of Megatron-LM before Megatron-Core, and both spellings of norms."""

from __future__ import annotations

import pytest

from anyckpt.errors import FormatError
from anyckpt.models.dialects.rank_names import fuse_norms, hub_names, part_norms, strip_wrappers

LAYER = "decoder.layers.0"


def renamed(*names: str, beside: tuple[str, ...] = ()) -> list[str]:
    """Hub names of one shard's names, with another shard that only tells what model it is."""
    first, _ = hub_names([dict.fromkeys(names, 0), dict.fromkeys(beside, 0)], ["a", "b"])
    return list(first)


@pytest.mark.parametrize(
    ("stored", "hub"),
    [
        ("language_model.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("language_model.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("language_model.embedding.position_embeddings.weight", "embedding.position_embeddings.weight"),
        ("language_model.output_layer.weight", "output_layer.weight"),
        ("word_embeddings_for_head.weight", "output_layer.weight"),
        ("language_model.encoder.layers.3.mlp.dense_h_to_4h.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
        ("language_model.transformer.layers.3.mlp.dense_4h_to_h.bias", "decoder.layers.3.mlp.linear_fc2.bias"),
        ("language_model.encoder.layers.0.self_attention.dense.bias", f"{LAYER}.self_attention.linear_proj.bias"),
        ("language_model.transformer.layers.0.attention.dense.bias", f"{LAYER}.self_attention.linear_proj.bias"),
        ("language_model.encoder.layers.0.self_attention.q_layernorm.bias", f"{LAYER}.self_attention.q_layernorm.bias"),
        ("language_model.encoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("language_model.encoder.final_norm.weight", "decoder.final_layernorm.weight"),
        (
            "language_model.encoder.layers.0.mlp.local_experts.2.dense_h_to_4h.weight",
            "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight",
        ),
        ("language_model.encoder.layers.0.mlp.router.weight", "decoder.layers.0.mlp.router.weight"),
    ],
)  # fmt: skip
def test_nested_names(stored: str, hub: str) -> None:
    assert renamed(stored) == [hub]


@pytest.mark.parametrize("ending", ["layernorm", "norm"])
def test_nested_norms_are_fused(ending: str) -> None:
    layer = "language_model.encoder.layers.0"
    assert renamed(
        f"{layer}.input_{ending}.weight",
        f"{layer}.self_attention.query_key_value.weight",
        f"{layer}.post_attention_{ending}.bias",
        f"{layer}.mlp.dense_h_to_4h.weight",
    ) == [
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
        "decoder.layers.0.mlp.linear_fc1.weight",
    ]


def test_the_encoder_of_a_bert_stays_an_encoder_on_every_stage() -> None:
    """The first stage's file does not tell; the last one's head does."""
    names = renamed("language_model.encoder.layers.0.mlp.dense_4h_to_h.weight", beside=("lm_head.dense.weight",))
    assert names == ["encoder.layers.0.mlp.linear_fc2.weight"]
    assert renamed(
        "lm_head.bias", "lm_head.layernorm.weight", "lm_head.norm.bias", "binary_head.weight",
        "language_model.pooler.dense.bias", "language_model.encoder.final_layernorm.bias",
    ) == [
        "output_layer.bias", "lm_head.layer_norm.weight", "lm_head.layer_norm.bias", "binary_head.weight",
        "pooler.dense.bias", "encoder.final_layernorm.bias",
    ]  # fmt: skip


def test_a_bert_with_norms_behind() -> None:
    """NeMo 1's ``post_ln``: one norm before the first layer, and those of layers under the names of others' norms."""
    layer = "language_model.encoder.layers.1"
    assert renamed(
        "language_model.encoder.initial_layernorm.weight",
        f"{layer}.input_layernorm.bias",
        f"{layer}.self_attention.query_key_value.weight",
        f"{layer}.post_attention_layernorm.weight",
        f"{layer}.mlp.dense_h_to_4h.weight",
    ) == [
        "encoder.initial_layernorm.weight",
        "encoder.layers.1.post_att_layernorm.bias",
        "encoder.layers.1.self_attention.linear_qkv.weight",
        "encoder.layers.1.post_mlp_layernorm.weight",
        "encoder.layers.1.mlp.linear_fc1.weight",
    ]


def test_an_encoder_decoder() -> None:
    layer = "language_model.decoder.layers.1"
    assert renamed(
        "language_model.encoder.layers.1.self_attention.dense.weight",
        f"{layer}.post_attention_layernorm.weight",
        f"{layer}.inter_attention.query.weight",
        f"{layer}.inter_attention.key_value.weight",
        f"{layer}.inter_attention.dense.weight",
        f"{layer}.post_inter_attention_layernorm.weight",
        f"{layer}.mlp.dense_h_to_4h.weight",
        "lm_head.bias",
    ) == [
        "encoder.layers.1.self_attention.linear_proj.weight",
        "decoder.layers.1.pre_cross_attn_layernorm.weight",
        "decoder.layers.1.cross_attention.linear_q.weight",
        "decoder.layers.1.cross_attention.linear_kv.weight",
        "decoder.layers.1.cross_attention.linear_proj.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "lm_head.output_layer.bias",
    ]


@pytest.mark.parametrize(
    ("own", "fused", "linear"),
    [
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
         "decoder.layers.0.self_attention.linear_qkv.weight"),
        ("decoder.layers.7.pre_mlp_layernorm.bias", "decoder.layers.7.mlp.linear_fc1.layer_norm_bias",
         "decoder.layers.7.mlp.linear_fc1.weight"),
        ("mtp.layers.0.transformer_layer.input_layernorm.weight",
         "mtp.layers.0.transformer_layer.self_attention.linear_qkv.layer_norm_weight",
         "mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight"),
        ("decoder.layers.0.self_attention.kv_layernorm.weight",
         "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight",
         "decoder.layers.0.self_attention.linear_kv_up_proj.weight"),
    ],
)  # fmt: skip
def test_norms_fuse_and_part(own: str, fused: str, linear: str) -> None:
    local, engine = {own: 1, linear: 2}, {fused: 1, linear: 2}
    assert fuse_norms(local) == fuse_norms(engine) == engine
    assert part_norms(engine) == part_norms(local) == local


def test_norms_without_their_linear_map_stay() -> None:
    names = {
        "decoder.layers.0.pre_mlp_layernorm.weight": 1,
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": 2,
        "decoder.layers.0.input_layernorm.weight": 3,
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight": 4,
        "decoder.layers.0.self_attention.q_layernorm.weight": 5,
    }
    assert fuse_norms(names) == part_norms(names) == names


def test_wrappers() -> None:
    assert strip_wrappers(["module.module.a", "module.module.b"]) == len("module.module.")
    assert strip_wrappers(["module.a", "b"]) == 0
    assert strip_wrappers([]) == 0


def test_a_weight_under_two_names_is_refused() -> None:
    with pytest.raises(FormatError, match="under two names"):
        renamed("language_model.output_layer.weight", "word_embeddings_for_head.weight")
