"""A plain decoder, as Llama and most families after it are: conditions, map, traits, and what its kin vary."""

from __future__ import annotations

from collections.abc import Iterator

from anyckpt.config.model import ModelConfig
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule

_LAYER = "model.layers.*"
_HUB = "decoder.layers.*"
_ATTENTION = f"{_LAYER}.self_attn"


def biased(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether all linear layers have biases."""
    return config.add_bias_linear


def _biased_qkv(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.add_bias_linear or config.add_qkv_bias


def untied(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether there is an output layer of its own."""
    return not config.share_embeddings_and_output_weights


RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    Rule((f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
         f"{_HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden"), INTERLEAVED_QKV),
    Rule((f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias"),
         f"{_HUB}.self_attention.linear_qkv.bias", ("qkv",), INTERLEAVED_QKV, _biased_qkv),
    Rule((f"{_ATTENTION}.o_proj.weight",), f"{_HUB}.self_attention.linear_proj.weight", ("hidden", "attention")),
    Rule((f"{_ATTENTION}.o_proj.bias",), f"{_HUB}.self_attention.linear_proj.bias", ("hidden",), when=biased),
    Rule((f"{_LAYER}.post_attention_layernorm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"), f"{_HUB}.mlp.linear_fc1.weight",
         ("fc1", "hidden"), GATE_UP),
    Rule((f"{_LAYER}.mlp.gate_proj.bias", f"{_LAYER}.mlp.up_proj.bias"), f"{_HUB}.mlp.linear_fc1.bias", ("fc1",),
         GATE_UP, biased),
    Rule((f"{_LAYER}.mlp.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule((f"{_LAYER}.mlp.down_proj.bias",), f"{_HUB}.mlp.linear_fc2.bias", ("hidden",), when=biased),
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
        Rule((f"{_LAYER}.mlp.{up}.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden")),
        Rule((f"{_LAYER}.mlp.{up}.bias",), f"{_HUB}.mlp.linear_fc1.bias", ("fc1",), when=biased),
        Rule((f"{_LAYER}.mlp.{down}.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
        Rule((f"{_LAYER}.mlp.{down}.bias",), f"{_HUB}.mlp.linear_fc2.bias", ("hidden",), when=biased),
    )  # fmt: skip


IGNORABLE = (
    ("model.layers.*.self_attn.rotary_emb.inv_freq", "rope frequencies, which follow from the configuration"),
    ("model.rotary_emb.inv_freq", "rope frequencies, which follow from the configuration"),
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

CAUSAL = {"use_bidirectional_attention": False}
"""Embedding models of the same classes see the whole text, which is no key of Megatron's."""


def one_residual_after_the_other(config: ModelConfig, kind: str) -> Iterator[str]:
    """Megatron's layers have one residual after the other."""
    if kind != "hf" and config.parallel_residual:
        yield (
            "attention and MLP of a layer run in parallel here, for which Megatron-Core has no layer: the weights are "
            "right, but a stock model of this configuration computes something else"
        )
