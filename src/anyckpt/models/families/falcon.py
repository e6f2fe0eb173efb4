"""Falcon 7B, 40B, 180B, 11B and Falcon-RW: three layouts of attention, all of which are Megatron's row for row.

* new (40B, 180B, 11B): query heads, key head and value head group by group;
* old with one key head (7B): all queries, then key, then value;
* old with as many key heads (RW): head by head.

Attention and MLP run one after the other, or in parallel with two norms (40B, 180B) or one (7B, 11B).  The map was
checked against transformers 5.23 and Megatron-Core 0.16 for layers one after the other; the rest was read from
transformers' sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Words
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import caveats, decoder, nemo2
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS, VOCABULARY
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule, lacks

_LAYER = "transformer.h.*"
_HUB = "decoder.layers.*"


def _has_two_norms(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.parallel_residual and not config.shared_layernorm


def _has_input_norm(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _has_two_norms(config, indices)


_NORMS = (
    ("input_layernorm", "self_attention.linear_qkv", _has_input_norm),
    ("ln_attn", "self_attention.linear_qkv", _has_two_norms),
    ("post_attention_layernorm", "mlp.linear_fc1", lacks("parallel_residual")),
    ("ln_mlp", "mlp.linear_fc1", _has_two_norms),
)

RULES = (
    Rule(("transformer.word_embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    *(rule for name, home, when in _NORMS for rule in norm(f"{_LAYER}.{name}", f"{_HUB}.{home}.layer_norm_", when)),
    *linear(f"{_LAYER}.self_attention.query_key_value", f"{_HUB}.self_attention.linear_qkv", ("qkv", "hidden"),
            bias=decoder.biased),
    *linear(f"{_LAYER}.self_attention.dense", f"{_HUB}.self_attention.linear_proj", ("hidden", "attention"),
            bias=decoder.biased),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden"), bias=decoder.biased),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn"), bias=decoder.biased),
    *norm("transformer.ln_f", "decoder.final_layernorm."),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


class _Layout(Codec):
    """Layout of attention, and norms."""

    hubs = ("num_query_groups", "parallel_residual", "shared_layernorm")
    keys = (
        "multi_query", "num_kv_heads", "n_head_kv", "new_decoder_architecture", "parallel_attn",
        "num_ln_in_parallel_attn",
    )  # fmt: skip

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        heads = found["num_attention_heads"]
        new = reader.flag("new_decoder_architecture") or False
        parallel = reader.flag("parallel_attn") is not False
        norms = reader.integer("num_ln_in_parallel_attn")
        norms = 2 if norms is None and new else norms
        if new and not parallel:
            raise MappingError(
                "config.json's new_decoder_architecture runs attention and MLP in parallel",
                expected="parallel_attn true", found="false",
            )  # fmt: skip
        if norms == 2 and not new:
            raise MappingError(
                "config.json has two norms before a layer of the old architecture, of which transformers uses none",
                expected="num_ln_in_parallel_attn null", found=norms,
            )  # fmt: skip
        groups = reader.integer("num_kv_heads") or reader.integer("n_head_kv") or heads
        if not new:
            groups = heads if reader.flag("multi_query") is False else 1
        return {
            "num_query_groups": groups,
            "parallel_residual": parallel,
            "shared_layernorm": parallel and norms != 2,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        heads, groups = config.num_attention_heads, config.num_query_groups
        two_norms = _has_two_norms(config, ())
        new = two_norms or groups not in (1, heads)
        if new and not config.parallel_residual:
            raise MappingError(
                "Falcon's layers with groups of heads run attention and MLP in parallel",
                expected=f"num_query_groups 1 or {heads}", found=groups,
            )  # fmt: skip
        return {
            "multi_query": groups == 1 or new,
            "num_kv_heads": groups if new else heads,
            "new_decoder_architecture": new,
            "parallel_attn": config.parallel_residual,
            "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        }


FAMILY = Family(
    name="falcon",
    title="Falcon, Falcon-RW",
    rules=RULES,
    traits={
        **decoder.PLAIN_TRAITS,
        "activation": "gelu",
        "rotary_interleaved": False,
    },
    recognise=lambda config: config.position_embedding_type in ("rope", "alibi") and config.rotary_percent == 1.0,
    caveats=caveats.one_residual_after_the_other,
    hugging_face=HuggingFace(
        model_types=("falcon", "RefinedWebModel", "RefinedWeb"),
        architectures=("FalconForCausalLM", "RWForCausalLM"),
        fields=(
            Field("num_layers", "num_hidden_layers", aliases=("n_layer",)),
            Field("hidden_size", "hidden_size", aliases=("n_embed",)),
            Field("num_attention_heads", "num_attention_heads", aliases=("n_head",)),
            Field("ffn_hidden_size", "ffn_hidden_size", default=lambda found: 4 * found["hidden_size"]),
            VOCABULARY,
            Field("max_position_embeddings", "max_position_embeddings", default=None),
            Field("layernorm_epsilon", "layer_norm_epsilon", "number"),
            Field("init_method_std", "initializer_range", "number", 0.02),
            Field("attention_dropout", "attention_dropout", "number", 0.0),
            Field("hidden_dropout", "hidden_dropout", "number", 0.0),
            Field("add_bias_linear", "bias", "flag", False),
            *TIED_AND_TOKENS,
        ),
        activation_key="activation",
        attention_bias=None,
        codecs=(
            Words(
                "position_embedding_type",
                "alibi",
                {False: "rope", True: "alibi"},
                False,
                "flag",
                "transformers' FalconForCausalLM has no such position embedding",
            ),
            _Layout(),
        ),
    ),
    nemo2=nemo2.general(),
)
