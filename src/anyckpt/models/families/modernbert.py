"""ModernBERT: rotary embedding, a gated MLP, norms before attention and MLP without biases, windows in most layers.

Checked against transformers 5.24.  NVIDIA has no converter, so that the family goes to containers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import OfClass
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import windowed_layers
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS
from anyckpt.models.families.parts.local_theta import LocalTheta
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import CONCATENATED_QKV
from anyckpt.models.language.rules import Rule, has

_LAYER, _HUB = "model.layers.*", "encoder.layers.*"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LM_HEAD = has("add_lm_head")
_LOCAL, _GLOBAL = 10_000.0, 160_000.0
_BIASES = {
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,
}


def _not_first(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return indices[0] > 0


RULES = (
    Rule(("model.embeddings.tok_embeddings.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule(("model.embeddings.norm.weight",), "encoder.initial_layernorm.weight", ("hidden",)),
    Rule((f"{_LAYER}.attn_norm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",),
         when=_not_first),
    Rule((f"{_LAYER}.attn.Wqkv.weight",), f"{_HUB}.self_attention.linear_qkv.weight", ("qkv", "hidden"),
         CONCATENATED_QKV),
    Rule((f"{_LAYER}.attn.Wo.weight",), f"{_HUB}.self_attention.linear_proj.weight", ("hidden", "attention")),
    Rule((f"{_LAYER}.mlp_norm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    Rule((f"{_LAYER}.mlp.Wi.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden")),
    Rule((f"{_LAYER}.mlp.Wo.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    Rule(("model.final_norm.weight",), "encoder.final_layernorm.weight", ("hidden",)),
    Rule(("head.dense.weight",), "lm_head.dense.weight", ("hidden", "hidden"), when=_LM_HEAD),
    Rule(("head.norm.weight",), "lm_head.layer_norm.weight", ("hidden",), when=_LM_HEAD),
    Rule(("decoder.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied_head),
    Rule(("decoder.bias",), "output_layer.bias", ("vocabulary",), when=_LM_HEAD),
)  # fmt: skip


class _Windows(Codec):
    """Half of ``local_attention`` to either side, in all layers but every so many, or in those that are listed."""

    hubs = ("window_size", "window_attn_skip_freq")
    keys = ("local_attention", "global_attn_every_n_layers", "layer_types", "sliding_window")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated, words = reader.integer("local_attention"), reader.values.get("layer_types")
        half = (defaults["local_attention"] if stated is None else stated) // 2
        every, layers = reader.integer("global_attn_every_n_layers") or 3, layers_of(found["num_layers"])
        if words is None:
            words = [_SLIDING if layer % every else _FULL for layer in layers]
        if not isinstance(words, list) or len(words) != len(layers) or not all(w in (_SLIDING, _FULL) for w in words):
            raise MappingError(
                "config.json's layer_types is not that of the model",
                expected=f"{_SLIDING} or {_FULL} for each of {len(layers)} layers",
                found=repr(words)[:80],
            )
        if half < 1:
            raise MappingError("config.json's local_attention is not possible", expected="2 or more", found=stated)
        if _SLIDING not in words:
            return dict.fromkeys(self.hubs)
        pattern = tuple(int(word == _SLIDING) for word in words)
        return {"window_size": (half, half), "window_attn_skip_freq": None if all(pattern) else pattern}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        left, right = config.window_size or (64, 64)
        if left != right or left < 1:
            raise MappingError("ModernBERT has no such window", expected="as wide on either side", found=(left, right))
        layers = windowed_layers(config)
        every = layers[1:].index(False) + 1 if False in layers[1:] else len(layers)
        regular = layers == [layer % every != 0 for layer in range(len(layers))]
        return {
            "local_attention": 2 * left,
            "layer_types": [_SLIDING if layer else _FULL for layer in layers],
            **({"global_attn_every_n_layers": every} if regular else {}),  # as transformers 4 has it
        }


FAMILY = Family(
    name="modernbert",
    title="ModernBERT",
    rules=RULES,
    traits={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
    },
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    hugging_face=HuggingFace(
        model_types=("modernbert",),
        architectures=("ModernBertForMaskedLM",),
        fields=(
            Field("num_layers", "num_hidden_layers"),
            Field("hidden_size", "hidden_size"),
            Field("ffn_hidden_size", "intermediate_size"),
            Field("num_attention_heads", "num_attention_heads"),
            Field("vocab_size", "vocab_size"),
            Field("max_position_embeddings", "max_position_embeddings"),
            Field("init_method_std", "initializer_range", "number", 0.02),
            Field("layernorm_epsilon", "norm_eps", "number"),
            Field("attention_dropout", "attention_dropout", "number", 0.0),
            *TIED_AND_TOKENS,
        ),
        constants=_BIASES,
        expected=_BIASES,
        rotary_base_key="global_rope_theta",
        rotary_base=_GLOBAL,
        activation_key="hidden_activation",
        attention_bias=None,
        codecs=(
            _Windows(),
            LocalTheta(_LOCAL, "local_rope_theta"),
            OfClass("ModernBert", {"ForMaskedLM": {"add_lm_head": True}, "Model": {}}, told_by=("add_lm_head",)),
        ),
        prefix="model.",
        headless=lambda config: not config.add_lm_head,
    ),
)
