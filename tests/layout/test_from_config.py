"""What decides shapes is the same whether a model's family is asked for or not, and what the frameworks mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.config import megatron, nemo1, of_ranks
from anyckpt.config.model import ModelConfig
from anyckpt.errors import MappingError
from anyckpt.layout import Geometry, Latent, Mamba, Parallelism, cut
from anyckpt.layout.from_config import geometry_of
from anyckpt.operations.steps.joining import geometry_of as geometry_of_checkpoint
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.tensor import from_array

ARGUMENTS = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 128,
    "max_position_embeddings": 128, "padded_vocab_size": 256, "vocab_size": 250,
}  # fmt: skip
NEMO = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 128,
    "encoder_seq_length": 128, "activation": "gelu", "mcore_gpt": True,
}  # fmt: skip
PLAIN = Geometry(
    num_layers=4, num_attention_heads=8, num_query_groups=8, kv_channels=8, share_embeddings_and_output_weights=True
)
ROWS = replace(PLAIN, padded_vocab_size=256)
BASES: dict[str, tuple[dict[str, Any], Geometry, Callable[[dict[str, Any]], ModelConfig]]] = {
    "megatron-args": (ARGUMENTS, ROWS, megatron.parse),
    "nemo1": (NEMO, PLAIN, nemo1.parse),
}
HYBRID = {"hybrid_override_pattern": "M*M*"}
GATED, ROPED = {"gated_linear_unit": True}, {"position_embedding_type": "rope"}


def mamba(groups: int) -> dict[str, Any]:
    return {"mamba": Mamba(2, 64, groups, 128)}


PROBES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("megatron-args", {}, {}),
    ("megatron-args", {"geglu": True}, GATED),
    ("megatron-args", {"glu_activation": "swiglu"}, GATED),
    ("megatron-args", {"num_moe_experts": 8, "moe_router_topk": 2}, {"num_experts": 8}),
    ("megatron-args", {**HYBRID, "mamba_ssm_ngroups": 2}, mamba(2)),
    ("megatron-args", {**HYBRID, "ngroups_mamba": 2}, mamba(2)),
    ("megatron-args", {"hybrid_layer_pattern": "M*M*", "mamba_num_groups": 2}, mamba(2)),
    (
        "megatron-args",
        {"hybrid_layer_pattern": "M*|M*/M*/M*", "mamba_num_groups": 2},
        {**mamba(2), "mtp_num_layers": 2},
    ),
    ("megatron-args", {"is_hybrid_model": True}, mamba(8)),
    ("megatron-args", {"num_query_groups": 1}, {}),
    ("megatron-args", {"num_query_groups": 1, "group_query_attention": True}, {"num_query_groups": 1}),
    ("megatron-args", {"num_query_groups": 4, "group_query_attention": False}, {}),
    ("megatron-args", {"num_query_groups": 4}, {"num_query_groups": 4}),
    ("megatron-args", {"kv_channels": 8.0}, {}),
    ("megatron-args", {"multi_latent_attention": True}, {"latent": Latent(None, 32, 64)}),
    ("megatron-args", {"quick_geglu": True}, GATED),
    ("megatron-args", {"swiglu": True}, GATED),
    ("megatron-args", {"attention_output_gate": True}, {"attention_output_gate": True}),
    ("megatron-args", {"mtp_num_layers": 0}, {}),
    ("megatron-args", {"untie_embeddings_and_output_weights": True}, {"share_embeddings_and_output_weights": False}),
    ("nemo1", {}, {}),
    *[("nemo1", {"activation": name}, GATED) for name in ("fast-swiglu", "geglu", "reglu", "swiglu", "quick-geglu")],
    ("nemo1", {"mcore_customization_config": {"num_query_groups": 2}}, {"num_query_groups": 2}),
    ("nemo1", {"mcore_customization_config": {"gated_linear_unit": True}}, GATED),
    ("nemo1", {"activation": "geglu", "mcore_customization_config": {"gated_linear_unit": False}}, {}),
    ("nemo1", {"gated_linear_unit": True}, {}),  # which NeMo 1 does not read
    ("nemo1", {"num_moe_experts": 8, "moe_router_topk": 2}, {"num_experts": 8}),
    ("nemo1", {"num_query_groups": 1}, {"num_query_groups": 1}),
    ("nemo1", {"num_query_groups": None}, {}),
    ("nemo1", {"kv_channels": None}, {}),
    ("nemo1", {"kv_channels": 16.0}, {"kv_channels": 16}),
    ("nemo1", {**HYBRID, "mamba_ssm_ngroups": 2}, mamba(2)),
    ("nemo1", {"share_embeddings_and_output_weights": None}, {}),
    ("nemo1", {"share_embeddings_and_output_weights": False}, {"share_embeddings_and_output_weights": False}),
    (
        "nemo1",
        {"multi_latent_attention": True, "kv_lora_rank": 16, "qk_pos_emb_head_dim": 8, "q_lora_rank": 8},
        {"latent": Latent(8, 16, 8)},
    ),
    ("nemo1", {"multi_latent_attention": True}, {"latent": Latent(512, 512, 64)}),
    ("nemo1", {"multi_latent_attention": True, "q_lora_rank": None}, {"latent": Latent(None, 512, 64)}),
    ("nemo1", {"override_vocab_size": 300}, {"padded_vocab_size": 300}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "more", "expected"), PROBES, ids=str)
def test_what_joins_and_what_renames_read_the_same(kind: str, more: dict[str, Any], expected: dict[str, Any]) -> None:
    base, plain, parse = BASES[kind]
    config = {**base, **more}
    found = geometry_of(of_ranks.sizes(config, kind))
    assert found == replace(plain, **expected)
    assert geometry_of(vars(parse(config))) == found


@pytest.mark.parametrize("part", ["cfg", "model"])
def test_nemo_1_under_a_training_scripts_key(part: str) -> None:
    config = {part: {**NEMO, "mcore_customization_config": {"num_query_groups": 2}}, "trainer": {"devices": 8}}
    assert geometry_of(of_ranks.sizes(config, "nemo1")) == replace(PLAIN, num_query_groups=2)
    again = nemo1.restated(config, {"num_query_groups": 4})
    assert again[part]["num_query_groups"] == 4
    assert again[part]["mcore_customization_config"] == {"num_query_groups": 2}


def test_biases_in_cores_words() -> None:
    custom = {"add_bias_linear": False, "add_qkv_bias": True}
    parsed = nemo1.parse({**NEMO, "bias": True, "qkv_bias": False, "mcore_customization_config": custom})
    assert (parsed.add_bias_linear, parsed.add_qkv_bias) == (False, True)


@pytest.mark.parametrize("kind", [None, "megatron-args", "nemo1"])
def test_nothing_said(kind: str | None) -> None:
    assert geometry_of(of_ranks.sizes({}, kind)) == Geometry(share_embeddings_and_output_weights=True)


def test_an_activation_of_no_known_model_still_joins() -> None:
    config = {**NEMO, "activation": "silu"}
    assert geometry_of(of_ranks.sizes(config, "nemo1")) == PLAIN
    with pytest.raises(MappingError, match="activation is unknown"):
        nemo1.parse(config)


@pytest.mark.parametrize("kind", of_ranks.KINDS)
@pytest.mark.parametrize(("key", "value"), [("num_layers", -1), ("kv_channels", "8"), ("num_attention_heads", 2.5)])
def test_impossible_sizes(kind: str, key: str, value: Any) -> None:
    with pytest.raises(MappingError, match=f"{key} is (not possible|of the wrong type)"):
        of_ranks.sizes({**BASES[kind][0], key: value}, kind)


def test_a_gate_in_the_second_half_is_of_no_family_that_has_it_in_the_first() -> None:
    config = {
        **ARGUMENTS, **ROPED, "glu_activation": "swiglu", "normalization": "RMSNorm", "add_bias_linear": False,
    }  # fmt: skip
    plain = {**config, "glu_activation": None, "swiglu": True, "untie_embeddings_and_output_weights": True}
    assert models.identify(Checkpoint("x", "x", {}, config=plain, config_kind="megatron-args")) is not None
    checkpoint = Checkpoint("x", "x", {}, config={**plain, **config}, config_kind="megatron-args")
    assert models.identify(checkpoint) is None


# -- defaults of NeMo 1's classes ------------------------------------------------------------------------------


def test_what_a_class_of_nemo_1_takes_decides_how_its_ranks_are_joined() -> None:
    config = {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_griffin_model.MegatronGriffinModel",
        "num_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 4,
        "encoder_seq_length": 8, "mcore_gpt": True,
    }  # fmt: skip
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    whole = {name: from_array(np.arange(32, dtype="<f4").reshape(8, 4))}
    shards = cut(whole, Parallelism(tensor_parallel=2), Geometry(num_layers=1, gated_linear_unit=True), complete=False)
    checkpoint = Checkpoint(
        "x", "nemo", {}, config=config, config_kind="nemo1", ranks=tuple(shards), layout=ParallelLayout(2)
    )
    assert geometry_of_checkpoint(checkpoint).gated_linear_unit
    joined = join_ranks(replace(checkpoint, ranks=tuple(shards))).tensors
    assert (joined[name].numpy() == whole[name].numpy()).all()
