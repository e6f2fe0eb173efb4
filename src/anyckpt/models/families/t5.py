"""T5 v1.1 (and Flan-T5), and original T5: an encoder and a decoder with relative positions.

Transformers' T5 does not divide attention scores by the square root of a head's width.  Megatron's layers do: where
that root is a power of two (as 8 of all T5's but 11B), query rows are multiplied by it, which changes no bit of a
mantissa; else the model gets ``softmax_scale`` 1, as NVIDIA's importer always does.  Original T5 multiplies what the
output layer gets by hidden_size ** -0.5, which here is part of the decoder's last norm.

Megatron-Core's T5Model registers its output layer twice, and gives one that is tied a bias.  The map was checked by
equal logits in Megatron-Core 0.16's T5Model.  NVIDIA's ``HFT5Importer`` (NeMo 2.5) gives the encoder as many layers as
the decoder has, the erf GELU in place of tanh's, and no scale to original T5: ours does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Implied, Noted, Words, Written, same_as
from anyckpt.config.encoder_keys import RELATIVE, SOFTMAX_SCALE
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.indexing import Shape
from anyckpt.models.families.parts import decoder
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import (
    GATE_UP,
    IDENTITY,
    INTERLEAVED_KV,
    INTERLEAVED_QKV,
    Operation,
    Scaled,
)
from anyckpt.models.language.rules import Condition, Rule, has, lacks


def _softmax(config: ModelConfig) -> float:
    """What query rows are multiplied by: the inverse of the factor that Megatron's attention multiplies scores by."""
    return math.sqrt(config.query_pre_attn_scalar or config.kv_channels)


def _output(config: ModelConfig) -> float:
    return config.hidden_size**-0.5 if config.scale_decoder_outputs else 1.0


def _stack(stack: str, axes: tuple[str, ...], mlp: int) -> tuple[Rule, ...]:
    """The rules of a stack's layers.

    Args:
        stack: ``encoder`` or ``decoder``.
        axes: what counts its layers.
        mlp: number of the MLP among a block's parts.
    """
    block, hub = f"{stack}.block.*.layer", f"{stack}.layers.*"
    attention, dense = f"{block}.0.SelfAttention", f"{block}.{mlp}.DenseReluDense"

    def rule(
        source: tuple[str, ...],
        name: str,
        shape: tuple[str, ...],
        operation: Operation = IDENTITY,
        when: Condition | None = None,
    ) -> Rule:
        found = Rule(source, f"{hub}.{name}", shape, operation, axes=axes)
        return found if when is None else replace(found, when=when)

    return (
        rule((f"{block}.0.layer_norm.weight",), "self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
        rule(tuple(f"{attention}.{name}.weight" for name in "qkv"), "self_attention.linear_qkv.weight",
             ("qkv", "hidden"), Scaled(INTERLEAVED_QKV, _softmax)),
        rule((f"{attention}.o.weight",), "self_attention.linear_proj.weight", ("hidden", "attention"), IDENTITY),
        rule((f"{block}.{mlp}.layer_norm.weight",), "mlp.linear_fc1.layer_norm_weight", ("hidden",)),
        rule((f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"), "mlp.linear_fc1.weight", ("fc1", "hidden"), GATE_UP,
             when=has("gated_linear_unit")),
        rule((f"{dense}.wi.weight",), "mlp.linear_fc1.weight", ("fc1", "hidden"),
             when=lacks("gated_linear_unit")),
        rule((f"{dense}.wo.weight",), "mlp.linear_fc2.weight", ("hidden", "ffn"), IDENTITY),
    )  # fmt: skip


_CROSS, _HUB = "decoder.block.*.layer.1", "decoder.layers.*"
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"

RULES = (
    Rule(("shared.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    *(
        Rule((f"{stack}.block.0.{_BIAS}",), f"{stack}_relative_pos_emb.relative_attention_bias.weight",
             ("buckets", "heads"))
        for stack in ("encoder", "decoder")
    ),
    *_stack("encoder", ("encoder",), 1),
    Rule(("encoder.final_layer_norm.weight",), "encoder.final_layernorm.weight", ("hidden",)),
    *_stack("decoder", ("layer",), 2),
    Rule((f"{_CROSS}.layer_norm.weight",), f"{_HUB}.pre_cross_attn_layernorm.weight", ("hidden",)),
    Rule((f"{_CROSS}.EncDecAttention.q.weight",), f"{_HUB}.cross_attention.linear_q.weight", ("attention", "hidden"),
         Scaled(IDENTITY, _softmax)),
    Rule((f"{_CROSS}.EncDecAttention.k.weight", f"{_CROSS}.EncDecAttention.v.weight"),
         f"{_HUB}.cross_attention.linear_kv.weight", ("key-value", "hidden"), INTERLEAVED_KV),
    Rule((f"{_CROSS}.EncDecAttention.o.weight",), f"{_HUB}.cross_attention.linear_proj.weight",
         ("hidden", "attention")),
    Rule(("decoder.final_layer_norm.weight",), "decoder.final_layernorm.weight", ("hidden",),
         Scaled(IDENTITY, _output)),
    Rule((), "lm_head.output_layer.bias", ("vocabulary",), when=has("share_embeddings_and_output_weights")),
    Rule(("lm_head.weight",), "lm_head.output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip

_DIMENSIONS = {
    "buckets": lambda config: config.relative_attention_num_buckets or 0,
    "heads": lambda config: config.num_attention_heads,
    "key-value": lambda config: 2 * config.num_query_groups * config.kv_channels,
}
_FIELDS = (
    Field("encoder_num_layers", "num_layers"),
    Field("num_layers", "num_decoder_layers", default=lambda found: found["encoder_num_layers"]),
    Field("hidden_size", "d_model"),
    Field("kv_channels", "d_kv"),
    Field("ffn_hidden_size", "d_ff"),
    Field("num_attention_heads", "num_heads"),
    Field("vocab_size", "vocab_size"),
    Field("relative_attention_num_buckets", "relative_attention_num_buckets"),
    Field("relative_attention_max_distance", "relative_attention_max_distance"),
    Field("hidden_dropout", "dropout_rate", "number"),
    Field("layernorm_epsilon", "layer_norm_epsilon", "number"),
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", True),
    Field("scale_decoder_outputs", "scale_decoder_outputs", "flag", same_as("share_embeddings_and_output_weights")),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
_ACTIVATIONS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-gelu_python": ("gelu", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}
"""``feed_forward_proj`` -> activation, and whether the MLP is gated; transformers takes ``gated-gelu`` for tanh's."""

_POSITIONS = 512
"""Longest sequence in frameworks that have to be told one, as both have it by default; the model has none."""


def _scalar(found: Mapping[str, Any]) -> float | None:
    """None where Megatron's scale is exact."""
    return None if math.frexp(math.sqrt(max(0, found["kv_channels"])))[0] == 0.5 else 1.0


def _function(fields: Mapping[str, Any]) -> str:
    """transformers' ``dense_act_fn``."""
    name = next((name for name, meant in _ACTIVATIONS.items() if meant == _meant(fields)), "")
    return "gelu_new" if name == "gated-gelu" else name.split("-")[-1]


def _meant(fields: Mapping[str, Any]) -> tuple[str, bool]:
    return fields["activation"], fields["gated_linear_unit"]


_CODECS = (
    Words(
        ("activation", "gated_linear_unit"),
        "feed_forward_proj",
        _ACTIVATIONS,
        "relu",
        refusal="transformers' T5ForConditionalGeneration has no such layers",
    ),
    Written({"dense_act_fn": _function, "is_gated_act": same_as("gated_linear_unit")}),
    Written({"decoder_start_token_id": lambda fields: fields["pad_token_id"] or 0}, kept=True),
    Implied({"position_embedding_type": "relative"}, "transformers' T5ForConditionalGeneration has no such positions"),
    Implied({"attention_dropout": same_as("hidden_dropout"), "query_pre_attn_scalar": _scalar}),
    Noted(
        lambda config: config.share_embeddings_and_output_weights and not config.scale_decoder_outputs,
        "transformers 4 takes tie_word_embeddings for a scale of logits that the model has not; transformers 5 reads "
        "scale_decoder_outputs",
    ),
)


def _refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """transformers 5 says of every T5 that it is tied, and then reads an output layer that is another."""
    of_transformers = "hf" in config.extra and not config.scale_decoder_outputs
    if of_transformers and "lm_head.output_layer.weight" in shapes:
        return replace(config, share_embeddings_and_output_weights=False)
    return config


def _length(fields: Mapping[str, Any]) -> int:
    length: int = fields["max_position_embeddings"] or _POSITIONS
    return length


def _lengths(config: ModelConfig, *stacks: str) -> dict[str, Any]:
    keys = ("seq_length", "max_position_embeddings", *(f"{stack}_seq_length" for stack in stacks))
    return dict.fromkeys(keys, _length(vars(config)))


def _megatron_keys(config: ModelConfig) -> Mapping[str, Any]:
    """Arguments of Megatron-LM's ``pretrain_t5.py``."""
    return _lengths(config, "encoder", "decoder")


def _nemo1_keys(config: ModelConfig) -> Mapping[str, Any]:
    """Keys of ``megatron_t5_config.yaml``."""
    return {
        "mcore_gpt": False,
        "mcore_t5": True,
        **_lengths(config, "encoder"),
        "pipeline_model_parallel_split_rank": 0,
        "embedding_init_method_std": config.init_method_std,
        "embedding_dropout": config.hidden_dropout,
        "data": {"dataset_type": "t5", "seq_length_dec": _length(vars(config))},
        "target": "nemo.collections.nlp.models.language_modeling.megatron_t5_model.MegatronT5Model",
    }


def _caveats(config: ModelConfig, kind: str) -> Iterable[str]:
    standard = (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (32, 128)
    if kind in ("nemo1", "nemo2") and not standard:
        yield "NeMo builds T5 with 32 buckets of relative positions up to 128 tokens, whatever its configuration says"
    if kind == "nemo1":
        yield "NeMo 1 restores a T5 with relative positions from a flat .nemo only, not from a distributed checkpoint"
    if kind == "nemo2" and config.scale_decoder_outputs:
        yield "on the way back from NeMo 2 the scale of original T5's logits stays part of the decoder's last norm"
    if kind == "megatron-args" and config.encoder_num_layers != config.num_layers:
        yield "Megatron-LM builds a T5 whose decoder has as many layers as its encoder: this one's has not"


FAMILY = Family(
    name="t5",
    title="T5 v1.1, Flan-T5, T5",
    rules=RULES,
    ignorable=(
        ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "transformers does not read it"),
    ),
    traits={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "relative",
        "parallel_residual": False,
        "transformer_block_type": "pre_ln",
    },
    features=frozenset({"decoder_num_layers", "mcore_t5"}),
    recognise=lambda config: config.encoder_num_layers is not None and config.position_embedding_type == "relative",
    refine=_refine,
    twins=tuple((f"output_layer.{part}", f"lm_head.output_layer.{part}") for part in ("weight", "bias")),
    prefixes={"nemo-flat": "enc_dec_model."},
    nemo1_keys=_nemo1_keys,
    megatron_keys=_megatron_keys,
    caveats=_caveats,
    axes={"encoder": lambda config: range(config.encoder_num_layers or 0)},
    dimensions=_DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("t5",),
        architectures=("T5ForConditionalGeneration",),
        fields=_FIELDS,
        constants={"is_encoder_decoder": True, "is_decoder": False},
        attention_bias=None,
        activation_key=None,
        codecs=_CODECS,
        copies=tuple((f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.t5.model.t5",
        model="T5Model",
        configs=("T5Config*",),
        fields=(Field("encoder_num_layers", "encoder_num_layers"), *RELATIVE),
        codecs=(
            Written(dict.fromkeys(("seq_length", "max_position_embeddings"), _length)),
            SOFTMAX_SCALE,
        ),
        without=frozenset({"rotary_base"}),
    ),
)  # fmt: skip
