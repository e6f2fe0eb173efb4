"""RecurrentGemma (Griffin): every third layer attends, the others have a gated linear recurrence.

NeMo 1 alone has such models, and not in parallel: its recurrence is as wide as the model on every rank.  Names and map
are those of its converters, of which the one to Hugging Face writes no output layer; the attention's biases, which
transformers' model has not, are zeros there.  ``megatron_griffin_config.yaml``, which they read, has a window of 1024
tokens; the models' is 2048.  Checked by equal logits in transformers and in what NeMo's modules compute, written down
anew, for its kernels need a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed, Multiple, same_as
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import Window
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule

_LAYER = "model.layers.*"
_BLOCK = f"{_LAYER}.temporal_block"
_LRU = f"{_BLOCK}.rg_lru"
_MLP = f"{_LAYER}.mlp_block"
_HUB = "decoder.layers.*"
_RECURRENT = f"{_HUB}.recurrent_layer"
_HUB_LRU = f"{_RECURRENT}.rg_lru"
_ATTENTION = f"{_HUB}.self_attention"
_PERIOD = ("recurrent", "recurrent", "attention")
_LENGTH = 8192
_OF = "that of NeMo's Griffin"


def _attends(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return indices[0] % len(_PERIOD) == 2


def _recurs(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return indices[0] % len(_PERIOD) != 2


RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.temporal_pre_norm.weight",), f"{_ATTENTION}.linear_qkv.layer_norm_weight", ("hidden",),
         when=_attends),
    Rule((f"{_BLOCK}.q_proj.weight", f"{_BLOCK}.k_proj.weight", f"{_BLOCK}.v_proj.weight"),
         f"{_ATTENTION}.linear_qkv.weight", ("qkv", "hidden"), INTERLEAVED_QKV, _attends),
    Rule((), f"{_ATTENTION}.linear_qkv.bias", ("qkv",), when=_attends),
    *linear(f"{_BLOCK}.o_proj", f"{_ATTENTION}.linear_proj", ("hidden", "attention"), when=_attends),
    Rule((f"{_LAYER}.temporal_pre_norm.weight",), f"{_RECURRENT}.linear_in.layer_norm_weight", ("hidden",),
         when=_recurs),
    *linear((f"{_BLOCK}.linear_x", f"{_BLOCK}.linear_y"), f"{_RECURRENT}.linear_in", ("twice", "hidden"), GATE_UP,
            _recurs),
    *linear(f"{_BLOCK}.linear_out", f"{_RECURRENT}.linear_out", ("hidden", "hidden"), when=_recurs),
    *linear(f"{_BLOCK}.conv_1d", f"{_RECURRENT}.conv_1d.conv_1d", ("hidden", "one", "kernel"), when=_recurs),
    Rule((f"{_LRU}.recurrent_param",), f"{_HUB_LRU}.a_param", ("hidden",), when=_recurs),
    Rule((f"{_LRU}.input_gate_weight",), f"{_HUB_LRU}.input_gate.w", ("heads", "block", "block"), when=_recurs),
    Rule((f"{_LRU}.input_gate_bias",), f"{_HUB_LRU}.input_gate.b", ("heads", "block"), when=_recurs),
    Rule((f"{_LRU}.recurrent_gate_weight",), f"{_HUB_LRU}.a_gate.w", ("heads", "block", "block"), when=_recurs),
    Rule((f"{_LRU}.recurrent_gate_bias",), f"{_HUB_LRU}.a_gate.b", ("heads", "block"), when=_recurs),
    Rule((f"{_LAYER}.channel_pre_norm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    *linear((f"{_MLP}.gate_proj", f"{_MLP}.up_proj"), f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden"), GATE_UP),
    *linear(f"{_MLP}.down_proj", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn")),
    Rule(("model.final_norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


def _nemo1(config: ModelConfig) -> Mapping[str, Any]:
    if not config.share_embeddings_and_output_weights:
        raise MappingError(
            "NeMo's Griffin has no output layer besides its embedding", expected="a tied model",
            found="tie_word_embeddings false", remedy="convert to hf",
        )  # fmt: skip
    return {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_griffin_model.MegatronGriffinModel",
        "vocab_size": config.rows,  # of which this class makes as many rows
        "logits_soft_cap": config.final_logit_softcapping,
        "gated_linear_unit": True,
    }


_NEMO1: Mapping[str, Any] = {
    "activation": "geglu",
    "openai_gelu": True,
    "layernorm_zero_centered_gamma": True,
    "rotary_percentage": 0.5,
    "position_embedding_type": "rope",
    "vocab_size": 256_000,
    "final_logit_softcapping": lambda values: values.get("logits_soft_cap", 30.0),
}

FAMILY = Family(
    name="recurrent-gemma",
    title="RecurrentGemma (Griffin)",
    rules=RULES,
    ignorable=(
        (f"{_BLOCK}.rotary_emb.inv_freq", decoder.FREQUENCIES),
        ("model.normalizer", "the square root of hidden_size"),
    ),
    traits={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "gelu_tanh",
        "gated_linear_unit": True,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
    },
    recognise=lambda config: config.rotary_percent != 1.0 and config.window_size is not None,
    megatron=False,
    nemo1_keys=_nemo1,
    nemo1_classes={"MegatronGriffinModel": _NEMO1},
    dimensions={
        "twice": lambda config: 2 * config.hidden_size,
        "kernel": lambda config: 4,
        "heads": lambda config: config.num_attention_heads,
        "block": lambda config: config.hidden_size // config.num_attention_heads,
    },
    hugging_face=HuggingFace(
        model_types=("recurrent_gemma",),
        architectures=("RecurrentGemmaForCausalLM",),
        fields=(
            *llama_fields_without("ffn_hidden_size", "kv_channels", "max_position_embeddings", "init_method_std"),
            Field("final_logit_softcapping", "logits_soft_cap", "number"),
        ),
        rotary_percent=0.5,
        attention_bias=None,
        activation_key="hidden_activation",
        codecs=(
            Fixed({"block_types": list(_PERIOD), "conv1d_width": 4, "lru_width": same_as("hidden_size")}, _OF),
            Fixed({"_block_types": list(_PERIOD), "attention_bias": False}, _OF, written=False),
            Multiple("ffn_hidden_size", "intermediate_size", 2, 3 * 2560),  # transformers' class halves it
            Window("attention_window_size", unset=_LENGTH),
            Field("max_position_embeddings", "max_position_embeddings", "count", _LENGTH, terse=True),
        ),
        keys=frozenset({"sliding_window"}),
    ),
)  # fmt: skip
