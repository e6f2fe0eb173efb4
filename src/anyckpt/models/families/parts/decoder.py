"""A plain decoder, as Llama and most families after it are: conditions, map, traits, and what its kin vary."""

from __future__ import annotations

from anyckpt.config.model import ModelConfig
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule, has, lacks

_LAYER = "model.layers.*"
_HUB = "decoder.layers.*"
_ATTENTION = f"{_LAYER}.self_attn"


QUERY_KEY_VALUE = tuple(f"{_ATTENTION}.{which}_proj" for which in "qkv")

biased = has("add_bias_linear")
"""Whether all linear layers have biases."""

untied = lacks("share_embeddings_and_output_weights")
"""Whether there is an output layer of its own."""


def untied_head(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a language model's head has an output layer of its own."""
    return config.add_lm_head and not config.share_embeddings_and_output_weights


def biased_qkv(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether query, key and value have biases."""
    return config.add_bias_linear or config.add_qkv_bias


RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    *linear(QUERY_KEY_VALUE, f"{_HUB}.self_attention.linear_qkv", ("qkv", "hidden"), INTERLEAVED_QKV, bias=biased_qkv),
    *linear(f"{_ATTENTION}.o_proj", f"{_HUB}.self_attention.linear_proj", ("hidden", "attention"), bias=biased),
    Rule((f"{_LAYER}.post_attention_layernorm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    *linear((f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"), f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden"), GATE_UP,
            bias=biased),
    *linear(f"{_LAYER}.mlp.down_proj", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn"), bias=biased),
    Rule(("model.norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=untied),
)  # fmt: skip
"""Llama's, in transformers' names."""

FUSED_GATE_UP = Rule((f"{_LAYER}.mlp.gate_up_proj.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden"))
"""Gate and up projection in one tensor."""

QUERY_KEY_NORMS = tuple(
    Rule((f"{_ATTENTION}.{which}_norm.weight",), f"{_HUB}.self_attention.{which}_layernorm.weight", ("head",))
    for which in ("q", "k")
)

WIDE_QUERY_KEY_NORMS = tuple(
    Rule((f"{_ATTENTION}.{which}_norm.weight",), f"{_HUB}.self_attention.{which}_layernorm.weight", (width,))
    for which, width in (("q", "attention"), ("k", "keys"))
)
"""Of all heads together, which Megatron-Core's own attention has not."""

NORM_BIASES = (
    Rule((f"{_LAYER}.input_layernorm.bias",), f"{_HUB}.self_attention.linear_qkv.layer_norm_bias", ("hidden",)),
    Rule((f"{_LAYER}.post_attention_layernorm.bias",), f"{_HUB}.mlp.linear_fc1.layer_norm_bias", ("hidden",)),
    Rule(("model.norm.bias",), "decoder.final_layernorm.bias", ("hidden",)),
)
"""Of LayerNorm in models that are named as Llama."""

WITHOUT_MLP = tuple(
    rule for rule in RULES if not rule.hub.startswith(f"{_HUB}.mlp.") or rule.hub.endswith("layer_norm_weight")
)
"""``RULES`` for ``plain_mlp`` to end."""


def plain_mlp(up: str, down: str) -> tuple[Rule, ...]:
    """An MLP without gate, by the names of its two layers."""
    return (
        *linear(f"{_LAYER}.mlp.{up}", f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden"), bias=biased),
        *linear(f"{_LAYER}.mlp.{down}", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn"), bias=biased),
    )


FREQUENCIES = "rope frequencies, which follow from the configuration"
MASK = "a mask, which follows from the configuration"
IGNORABLE = (
    ("model.layers.*.self_attn.rotary_emb.inv_freq", FREQUENCIES),
    ("model.rotary_emb.inv_freq", FREQUENCIES),
)

TRAITS = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "activation": "silu",
    "gated_linear_unit": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
}

PLAIN_TRAITS = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
"""Of models before Llama: norms with biases and an MLP without gate."""

ROTARY_TRAITS = {**PLAIN_TRAITS, "position_embedding_type": "rope", "rotary_interleaved": False}

LEARNED_TRAITS = {
    **PLAIN_TRAITS,
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "parallel_residual": False,
}

CAUSAL = {"use_bidirectional_attention": False}
"""Embedding models of the same classes see the whole text, which is no key of Megatron's."""
