"""MPT: alibi, no biases, and query, key and value in one matrix, all queries first.

transformers 5.23 computes the same logits with what comes back, and so does attention with the hub's interleaved rows.
NeMo 1's converter only renames that matrix, so that its heads are mixed up.  Megatron's norms have biases, which are
zeros here.  Only NeMo 1's own modules have alibi.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.config.codecs import Times, Words
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS, VOCABULARY
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import CONCATENATED_QKV
from anyckpt.models.language.rules import Rule

_LAYER = "transformer.blocks.*"
_HUB = "decoder.layers.*"
_USUAL = {"attn_type": "multihead_attention", "qk_ln": False, "prefix_lm": False, "softmax_scale": None}
_MODEL = {"no_bias": True, "logit_scale": None}
_NORMS = {"low_precision_layernorm": "LayerNorm", "layernorm": "LayerNorm"}
_UNSAID = {"clip_qkv": None, "alibi_bias_max": 8}

RULES = (
    Rule(("transformer.wte.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.norm_1.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    Rule((), f"{_HUB}.self_attention.linear_qkv.layer_norm_bias", ("hidden",)),
    Rule((f"{_LAYER}.attn.Wqkv.weight",), f"{_HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden"),
         CONCATENATED_QKV),
    Rule((f"{_LAYER}.attn.out_proj.weight",), f"{_HUB}.self_attention.linear_proj.weight", ("hidden", "attention")),
    Rule((f"{_LAYER}.norm_2.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((), f"{_HUB}.mlp.linear_fc1.layer_norm_bias", ("hidden",)),
    Rule((f"{_LAYER}.ffn.up_proj.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden")),
    Rule((f"{_LAYER}.ffn.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule(("transformer.norm_f.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule((), "decoder.final_layernorm.bias", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


class _Attention(Codec):
    """``attn_config`` of alibi; of the rest, what is nothing of the hub's is kept as the source says it."""

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = Reader(reader.mapping("attn_config"), "config.json's attn_config")
        for key, usual in _USUAL.items():
            if stated.values.get(key, usual) != usual:
                raise MappingError(
                    f"config.json's {key} is not that of the family", expected=usual,
                    found=repr(stated.values[key])[:80],
                )  # fmt: skip
        if stated.flag("alibi") is False:
            raise MappingError("config.json's attn_config is not that of the family", expected="alibi", found="none")
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if config.position_embedding_type != "alibi":
            raise MappingError(
                "transformers' MptForCausalLM has no such position embedding", expected="alibi",
                found=config.position_embedding_type,
            )  # fmt: skip
        return {"attn_config": {"alibi": True, **_attention(config)}}


def _attention(config: ModelConfig) -> Mapping[str, Any]:
    """What the source says of attention besides what the hub's configuration has."""
    stated = config.extra.get("hf", {}).get("attn_config")
    return stated if isinstance(stated, Mapping) else {}


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    for key, usual in _UNSAID.items():
        value = _attention(config).get(key, usual)
        if kind != "hf" and value != usual:
            yield f"attn_config's {key} of {value} has no place there: the target's layers compute with {usual}"


FAMILY = Family(
    name="mpt",
    title="MPT",
    rules=RULES,
    traits={
        **decoder.PLAIN_TRAITS,
        "activation": "gelu",
        "add_bias_linear": False,
        "position_embedding_type": "alibi",
        "parallel_residual": False,
    },
    recognise=lambda config: config.num_query_groups == config.num_attention_heads,
    hugging_face=HuggingFace(
        model_types=("mpt",),
        architectures=("MptForCausalLM", "MPTForCausalLM"),
        fields=(
            Field("num_layers", "n_layers"),
            Field("hidden_size", "d_model"),
            Field("num_attention_heads", "n_heads"),
            VOCABULARY,
            Field("max_position_embeddings", "max_seq_len"),
            Field("layernorm_epsilon", "layer_norm_epsilon", "number"),
            Field("init_method_std", "initializer_range", "number", 0.02),
            Field("hidden_dropout", "resid_pdrop", "number", 0.0),
            *TIED_AND_TOKENS,
        ),
        constants=_MODEL,
        expected=_MODEL,
        attention_bias=None,
        activation_key=None,
        codecs=(
            Words("normalization", "norm_type", _NORMS, "low_precision_layernorm"),
            Times("ffn_hidden_size", "expansion_ratio", "hidden_size", default=4),
            _Attention(),
        ),
    ),
    caveats=_caveats,
)
