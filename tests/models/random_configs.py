"""Random, valid ``config.json`` of every family: from its samples, by its own table of keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tests.models.proofs import PROOFS, samples

from anyckpt.config.hugging_face import is_rotary
from anyckpt.models import Family, Model

Config = dict[str, Any]

_WIDTHS = st.integers(1, 60_000)
_TOKENS = st.none() | st.integers(0, 200_000)
_RATES = st.sampled_from([0.0, 0.1, 0.25])
_CAPS = st.none() | st.sampled_from([30.0, 50.0])

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "ffn_hidden_size": _WIDTHS,
    "moe_ffn_hidden_size": _WIDTHS,
    "vocab_size": st.integers(1, 300_000),
    "max_position_embeddings": st.integers(1, 1 << 20),
    "layernorm_epsilon": st.sampled_from([1e-5, 1e-6, 1e-8, 1e-12]),
    "init_method_std": st.sampled_from([0.02, 0.01, 0.008944]),
    "attention_dropout": _RATES,
    "hidden_dropout": _RATES,
    "share_embeddings_and_output_weights": st.booleans(),
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS | st.lists(st.integers(0, 100), min_size=1, max_size=3),
    "pad_token_id": _TOKENS,
    "num_moe_experts": st.sampled_from([8, 16, 64]),
    "moe_router_topk": st.sampled_from([1, 2, 8]),
    "moe_aux_loss_coeff": st.sampled_from([0.0, 0.001, 0.125]),
    "moe_router_topk_scaling_factor": st.sampled_from([1.0, 2.5, 0.5]),
    "moe_shared_expert_intermediate_size": _WIDTHS,
    "kv_lora_rank": _WIDTHS,
    "qk_head_dim": st.integers(1, 256),
    "qk_pos_emb_head_dim": st.sampled_from([8, 64]),
    "v_head_dim": st.integers(1, 256),
    "mamba_state_dim": st.sampled_from([16, 128, 256]),
    "activation_func_clamp_value": st.sampled_from([7.0, 5.0]),
    "query_pre_attn_scalar": st.integers(1, 300),
    "attn_logit_softcapping": _CAPS,
    "final_logit_softcapping": _CAPS,
    "parallel_residual": st.booleans(),
    "qk_l2_norm": st.booleans(),
    "num_tokentypes": st.integers(1, 4),
    "relative_attention_num_buckets": st.sampled_from([16, 32]),
    "relative_attention_max_distance": st.sampled_from([64, 128]),
}
"""By the hub's field, for every family that has it among its one-to-one keys."""

_OF_LAYERS = {
    "layers_block_type", "hybrid_override_pattern", "block_configs", "no_rope_layers", "moe_layers", "mlp_only_layers",
    "mlp_layer_types",
}  # fmt: skip
"""Keys that say something of each layer: with one of them the number of layers stays."""

_OWN_ROPE = {"rope_local_base_freq", "rope_ratio"}
"""Keys by which a family says theta in a way of its own."""

_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_SCALINGS = st.sampled_from([None, None, {"rope_type": "linear", "factor": 4.0}, _LLAMA_3, _YARN])

Draw = Callable[[st.SearchStrategy[Any]], Any]


@cache
def _sample(name: str) -> tuple[str, Model]:
    checkpoint, model = samples()[name].open()
    return json.dumps(dict(checkpoint.config)), model


def _window(draw: Draw, config: Config) -> Config:
    return {"sliding_window": draw(st.none() | st.integers(1, 40_000))}


def _certain_window(draw: Draw, config: Config) -> Config:
    return {"sliding_window": draw(st.integers(1, 40_000))}


def _qwens_window(draw: Draw, config: Config) -> Config:
    return {
        "sliding_window": draw(st.integers(1, 40_000)),
        "use_sliding_window": draw(st.booleans()),
        "max_window_layers": draw(st.integers(0, 41)),
    }


def _qwens_experts(draw: Draw, config: Config) -> Config:
    return {"decoder_sparse_step": draw(st.integers(1, 3))}


def _biases(draw: Draw, config: Config) -> Config:
    return dict.fromkeys(("mlp_bias", "attention_bias"), draw(st.booleans()))


def _deepseeks_experts(draw: Draw, config: Config) -> Config:
    return {
        "n_shared_experts": draw(st.none() | st.integers(1, 3)),
        "first_k_dense_replace": draw(st.integers(0, config["num_hidden_layers"])),
        "q_lora_rank": draw(st.none() | _WIDTHS),
        "n_group": 4,
        "topk_group": draw(st.integers(1, 4)),
    }


def _falcons_keys(draw: Draw, config: Config) -> Config:
    """Of the new architecture; the old has one key head or as many as there are heads."""
    heads = config["num_attention_heads"]
    groups = [number for number in range(1, heads + 1) if heads % number == 0]
    return {"num_kv_heads": draw(st.sampled_from(groups))} if config.get("new_decoder_architecture") else {}


def _whispers_decoder(draw: Draw, config: Config) -> Config:
    """Of the encoder's sizes."""
    return {f"decoder_{key}": config[f"encoder_{key}"] for key in ("attention_heads", "ffn_dim")}


EXTRAS: Mapping[str, Callable[[Draw, Config], Config]] = {
    "falcon": _falcons_keys,
    "llama": _biases,
    "nemotron": _biases,
    "qwen2": _qwens_window,
    "qwen3": _qwens_window,
    "qwen2-moe": _qwens_experts,
    "qwen3-moe": _qwens_experts,
    "gemma2": _certain_window,
    "gemma3": _certain_window,
    "gpt-oss": _window,
    "starcoder2": _window,
    "mistral": _window,
    "mixtral": _window,
    "deepseek-v3": _deepseeks_experts,
    "whisper": _whispers_decoder,
}
"""Keys of families that are no one-to-one keys."""


@st.composite
def configs(draw: st.DrawFn, family: str) -> Config:
    """A ``config.json`` like that of a sample, with other values of what its table of keys knows."""
    text, model = _sample(draw(st.sampled_from([sample.name for sample in PROOFS[family].samples])))
    config: Config = json.loads(text)
    definition = model.definition
    keys = {entry.hub: entry.key for entry in definition.hugging_face.fields}
    for hub, key in keys.items():
        if hub in VALUES and draw(st.booleans()):
            config[key] = draw(VALUES[hub])
    config |= _heads(draw, keys, model)
    if "num_layers" in keys and not any(config.get(key) for key in _OF_LAYERS):
        for key in ("layer_types", "mlp_layer_types", "indexer_types"):
            config.pop(key, None)
        config[keys["num_layers"]] = draw(st.integers(1, 40))
    config |= _rope(draw, definition, model, config)
    config |= EXTRAS.get(family, lambda draw, config: {})(draw, config)
    return config


def _heads(draw: Draw, keys: Mapping[str, str], model: Model) -> Config:
    """Sizes of attention that go together, where keys of their own say them."""
    of_layers = "block_configs" in model.definition.hugging_face.handled
    if "num_attention_heads" not in keys or model.config.multi_latent_attention or of_layers:
        return {}
    groups, ratio, width = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 64]))
    found: Config = {keys["num_attention_heads"]: groups * ratio}
    if "hidden_size" in keys:
        found[keys["hidden_size"]] = groups * ratio * width
    if "num_query_groups" in keys:
        found[keys["num_query_groups"]] = groups
    if "kv_channels" in keys:
        found[keys["kv_channels"]] = draw(st.sampled_from([width, 2 * width, 32]))
    return found


def _rope(draw: Draw, definition: Family, model: Model, config: Config) -> Config:
    """Theta and its scaling in either spelling."""
    known = definition.hugging_face
    if not is_rotary(definition) or model.config.position_embedding_type != "rope" or known.handled & _OWN_ROPE:
        return {}
    theta, scaling = draw(st.sampled_from([10000.0, 1e6, 12345.5])), draw(_SCALINGS)
    percent = model.config.rotary_percent
    if draw(st.booleans()):
        both = {"rope_theta": theta, "partial_rotary_factor": percent, **(scaling or {"rope_type": "default"})}
        return {"rope_parameters": both}
    config.pop("rope_parameters", None)
    old = {known.rotary_base_key: theta, known.rotary_percent_key: percent}
    unscaled = {"rope_type": "default"} if definition.name == "gpt-oss" else None  # where null is YaRN
    return {**old, "rope_scaling": scaling or unscaled}
