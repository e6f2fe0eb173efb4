"""Gemma 3n, text: four streams of a residual that predict one another, a low-rank path and an input for each layer.

Outputs were checked against transformers 5.24.  Neither Megatron-Core nor Megatron-Bridge 0.6 has such layers, so that
the family goes to containers alone; the hub's names of what is the family's own are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import LARGEST, impossible
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import AllBut, LayerWindow
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.by_layer import Carried
from anyckpt.models.families.parts.fields import llama_fields_without
from anyckpt.models.families.parts.local_theta import LocalTheta
from anyckpt.models.families.parts.modules import alone
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule, always

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_TYPE = "gemma3n_text"
_KEYS = Carried(_TYPE)


def _shares(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a layer takes the keys and values of one before it."""
    return indices[0] >= config.num_layers - _KEYS.size(config, "num_kv_shared_layers")


def _has_keys(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _shares(config, indices)


def _layer(config: ModelConfig, layer: int) -> ModelConfig:
    """With the width of a layer's MLP, where each has one of its own."""
    widths = _KEYS.reader(config).values.get("intermediate_size")
    if not isinstance(widths, (list, tuple)):
        return config
    if len(widths) != config.num_layers or type(widths[layer]) is not int or not 0 < widths[layer] < LARGEST:
        raise impossible(
            "intermediate_size", f"a size, or one for each of {config.num_layers} layers", str(widths)[:80]
        )
    return replace(config, ffn_hidden_size=widths[layer])


class _Width(Codec):
    """The width of the first layer's MLP; what is said of all goes with ``config.json`` as it is."""

    hubs = ("ffn_hidden_size",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.values.get("intermediate_size")
        if isinstance(stated, (list, tuple)):
            return {"ffn_hidden_size": Reader({"first": next(iter(stated), None)}, "config.json").integer("first") or 0}
        return {"ffn_hidden_size": reader.integer("intermediate_size") or defaults["intermediate_size"]}


def _attention(names: str, hub: str, shape: tuple[str, ...], **how: Any) -> Rule:
    source = tuple(f"{_LAYER}.self_attn.{name}.weight" for name in names.split())
    return Rule(source, f"{_HUB}.self_attention.{hub}", shape, **how)


_OWN: Mapping[str, tuple[str, ...]] = {
    "altup.correct_output_scale": ("hidden",),
    "altup.correction_coefs.weight": ("streams", "streams"),
    "altup.prediction_coefs.weight": ("streams-squared", "streams"),
    "altup.modality_router.weight": ("streams", "hidden"),
    "altup.router_norm.weight": ("hidden",),
    "laurel.linear_left.weight": ("laurel", "hidden"),
    "laurel.linear_right.weight": ("hidden", "laurel"),
    "laurel.post_laurel_norm.weight": ("hidden",),
    "per_layer_input_gate.weight": ("inputs", "hidden"),
    "per_layer_projection.weight": ("hidden", "inputs"),
    "post_per_layer_input_norm.weight": ("hidden",),
}
_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "embed_tokens_per_layer.weight": ("inputs-vocabulary", "all-inputs"),
    "per_layer_model_projection.weight": ("all-inputs", "hidden"),
    "per_layer_projection_norm.weight": ("inputs",),
}

RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    *alone(Rule((f"model.{name}",), name, shape) for name, shape in _OUTSIDE.items()),
    *(
        Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.{linear}.layer_norm_weight", ("hidden",),
             when=when)
        for linear, when in (("linear_qkv", _has_keys), ("linear_q", _shares))
    ),
    _attention("q_proj k_proj v_proj", "linear_qkv.weight", ("qkv", "hidden"), operation=INTERLEAVED_QKV,
               when=_has_keys),
    _attention("q_proj", "linear_q.weight", ("attention", "hidden"), when=_shares),
    _attention("q_norm", "q_layernorm.weight", ("head",), when=always),
    _attention("k_norm", "k_layernorm.weight", ("head",), when=_has_keys),
    _attention("o_proj", "linear_proj.weight", ("hidden", "attention")),
    *(
        Rule((f"{_LAYER}.{source}.weight",), f"{_HUB}.{hub}", ("hidden",))
        for source, hub in (
            ("post_attention_layernorm", "self_attention.linear_proj.post_layernorm.weight"),
            ("pre_feedforward_layernorm", "mlp.linear_fc1.layer_norm_weight"),
            ("post_feedforward_layernorm", "mlp.linear_fc2.post_layernorm.weight"),
        )
    ),
    Rule((f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"), f"{_HUB}.mlp.linear_fc1.weight",
         ("fc1", "hidden"), GATE_UP),
    Rule((f"{_LAYER}.mlp.down_proj.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
    *alone(Rule((f"{_LAYER}.{name}",), f"{_HUB}.{name}", shape) for name, shape in _OWN.items()),
    *alone(
        Rule((f"model.{name}.*.weight",), f"{name}.*.weight", ("hidden", "hidden"), axes=("stream",))
        for name in ("altup_projections", "altup_unembed_projections")
    ),
    Rule(("model.norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip

FAMILY = Family(
    name="gemma3n",
    title="Gemma 3n (text)",
    rules=RULES,
    ignorable=tuple(
        (f"{_LAYER}.self_attn.{name}.weight", "a layer that takes another's keys and values has no use for its own")
        for name in ("k_proj", "v_proj", "k_norm", "v_norm")
    ),
    traits={**decoder.TRAITS, "activation": "gelu_tanh", "add_bias_linear": False, "qk_layernorm": True},
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    layer=_layer,
    axes={"stream": lambda config: range(max(0, min(_KEYS.size(config, "altup_num_inputs"), 1000) - 1))},
    dimensions={
        "streams": lambda config: _KEYS.size(config, "altup_num_inputs"),
        "streams-squared": lambda config: _KEYS.size(config, "altup_num_inputs") ** 2,
        "laurel": lambda config: _KEYS.size(config, "laurel_rank"),
        "inputs": lambda config: _KEYS.size(config, "hidden_size_per_layer_input"),
        "all-inputs": lambda config: config.num_layers * _KEYS.size(config, "hidden_size_per_layer_input"),
        "inputs-vocabulary": lambda config: _KEYS.size(config, "vocab_size_per_layer_input"),
    },
    hugging_face=HuggingFace(
        model_types=(_TYPE,),
        architectures=("Gemma3nForCausalLM",),
        fields=(
            *llama_fields_without("ffn_hidden_size"),
            Field("final_logit_softcapping", "final_logit_softcapping", "number", None, null=True),
        ),
        activation_key="hidden_activation",
        rotary_base=1_000_000.0,
        expected=decoder.CAUSAL,
        codecs=(_Width(), LayerWindow(AllBut(5), unset=512), LocalTheta(10_000.0, "rope_local_base_freq")),
        carried=frozenset({
            "intermediate_size", "vocab_size_per_layer_input", "hidden_size_per_layer_input", "altup_active_idx",
            "altup_coef_clip", "altup_correct_scale", "altup_num_inputs", "num_kv_shared_layers", "laurel_rank",
            "activation_sparsity_pattern",
        }),
    ),
)  # fmt: skip
