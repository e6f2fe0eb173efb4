"""LFM2: short convolutions in place of attention in most layers.

Checked against transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge has such layers, so that the family goes
to containers alone; the hub's names of the convolution are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_CONV, _FULL = "conv", "full_attention"
_TIED = "share_embeddings_and_output_weights"


def _convolves(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.short_conv_freq is not None and config.short_conv_freq[indices[0]] == 1


def _attends(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _convolves(config, indices)


def _conv(name: str, shape: tuple[str, ...], stored: str = "") -> Rule:
    return Rule((f"{_LAYER}.conv.{stored or name}.weight",), f"{_HUB}.short_conv.{name}.weight", shape,
                when=_convolves, partition="alone")  # fmt: skip


def _attention(source: tuple[str, ...], hub: str, shape: tuple[str, ...], **how: Any) -> Rule:
    return Rule(tuple(f"{_LAYER}.self_attn.{name}.weight" for name in source), f"{_HUB}.self_attention.{hub}.weight",
                shape, when=_attends, **how)  # fmt: skip


_MLP = f"{_LAYER}.feed_forward"
RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule(
        (f"{_LAYER}.operator_norm.weight",),
        f"{_HUB}.short_conv.in_proj.layer_norm_weight",
        ("hidden",),
        when=_convolves,
    ),
    Rule(
        (f"{_LAYER}.operator_norm.weight",),
        f"{_HUB}.self_attention.linear_qkv.layer_norm_weight",
        ("hidden",),
        when=_attends,
    ),
    _conv("in_proj", ("three-hidden", "hidden")),
    _conv("conv1d", ("hidden", "one", "kernel"), "conv"),
    _conv("out_proj", ("hidden", "hidden")),
    _attention(("q_proj", "k_proj", "v_proj"), "linear_qkv", ("qkv", "hidden"), operation=INTERLEAVED_QKV),
    _attention(("q_layernorm",), "q_layernorm", ("head",)),
    _attention(("k_layernorm",), "k_layernorm", ("head",)),
    _attention(("out_proj",), "linear_proj", ("hidden", "attention")),
    Rule((f"{_LAYER}.ffn_norm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((f"{_MLP}.w1.weight", f"{_MLP}.w3.weight"), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden"), GATE_UP),
    Rule((f"{_MLP}.w2.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule(("model.embedding_norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)


class _Width(Codec):
    """The MLP's width, which the class computes of a stated one unless it is told not to."""

    hubs = ("ffn_hidden_size",)
    keys = (
        "intermediate_size",
        "block_ff_dim",
        "block_auto_adjust_ff_dim",
        "block_ffn_dim_multiplier",
        "block_multiple_of",
    )

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        width = reader.integer("block_ff_dim") or reader.integer("intermediate_size") or defaults["intermediate_size"]
        adjusted = reader.flag("block_auto_adjust_ff_dim")
        if adjusted is None or adjusted:
            multiple = reader.integer("block_multiple_of") or defaults["block_multiple_of"]
            factor = reader.number("block_ffn_dim_multiplier")
            factor = defaults["block_ffn_dim_multiplier"] if factor is None else factor
            if not (0 < width < 1 << 40 and 0 < multiple < 1 << 40 and 0 < factor < 1e6):
                raise MappingError("config.json's width of the MLP is not possible", found=(width, factor, multiple))
            width = -(-int(factor * int(2 * width / 3)) // multiple) * multiple
        return {"ffn_hidden_size": width}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {"intermediate_size": config.ffn_hidden_size, "block_auto_adjust_ff_dim": False}


class _Layers(Codec):
    """Which layers convolve: in words, or all but those whose numbers are listed."""

    hubs = ("short_conv_freq",)
    keys = ("layer_types", "full_attn_idxs")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        layers = layers_of(found["num_layers"])
        words, listed = reader.values.get("layer_types"), reader.values.get("full_attn_idxs")
        if words is None and isinstance(listed, list):
            words = [_FULL if layer in listed else _CONV for layer in layers]
        words = [_FULL] * len(layers) if words is None else words
        if not isinstance(words, list) or len(words) != len(layers) or not all(w in (_CONV, _FULL) for w in words):
            raise MappingError(
                "config.json's layer_types is not that of the model",
                expected=f"{_CONV} or {_FULL} for each of {len(layers)} layers",
                found=repr(words)[:80],
            )
        found_layers = tuple(int(word == _CONV) for word in words)
        return {"short_conv_freq": found_layers if any(found_layers) else None}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        layers = config.short_conv_freq or (0,) * config.num_layers
        return {
            "layer_types": [_CONV if layer else _FULL for layer in layers],
            "full_attn_idxs": [number for number, layer in enumerate(layers) if not layer],
        }


FAMILY = Family(
    name="lfm2",
    title="LFM2",
    rules=RULES,
    traits={**decoder.TRAITS, "add_bias_linear": False, "qk_layernorm": True},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    dimensions={
        "three-hidden": lambda config: 3 * config.hidden_size,
        "kernel": lambda config: config.short_conv_kernel_dim or 0,
    },
    hugging_face=HuggingFace(
        model_types=("lfm2",),
        architectures=("Lfm2ForCausalLM",),
        fields=(
            *llama_fields_without("ffn_hidden_size", "layernorm_epsilon", "kv_channels", _TIED),
            Field(_TIED, "tie_word_embeddings", "flag", True, aliases=("tie_embedding",)),
            Field("layernorm_epsilon", "norm_eps", "number", aliases=("block_norm_eps",)),
            Field("short_conv_kernel_dim", "conv_L_cache"),
        ),
        activation_key=None,
        rotary_base=1_000_000.0,
        attention_bias=None,
        codecs=(_Width(), _Layers(), Fixed({"conv_bias": False}, "what is known")),
    ),
)
