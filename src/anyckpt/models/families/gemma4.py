"""Gemma 4, text: layers of two kinds with heads of two widths, keys that are values, a small input for each layer.

Names are near those of Megatron-Bridge 0.6.2, whose modules for it are of its own; queries without keys and keys
without values have ours.  Outputs were checked against transformers 5.24.  Megatron-Core has no such layers, so that
the family goes to containers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import LARGEST, impossible
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.config.windows import AllBut, LayerWindow, windowed_layers
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.by_layer import Carried, RopeByLayer
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV, Interleaved
from anyckpt.models.language.rules import Condition, Rule, has, lacks

_LAYER, _HUB = "model.layers.*", "decoder.layers.*"
_TYPE = "gemma4_text"
_KEYS = Carried(_TYPE)
_UNIFIED = {
    "hidden_size_per_layer_input": 0, "max_position_embeddings": 262_144, "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}  # fmt: skip
"""What the class of the text part of a model without towers takes that Gemma 4's does not."""


def _shares(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether a layer takes the keys and values of one before it."""
    return indices[0] >= config.num_layers - _KEYS.size(config, "num_kv_shared_layers")


def _is_full(config: ModelConfig, layer: int) -> bool:
    """Whether a layer sees all tokens, as the last one does whatever is said of it."""
    return layer == config.num_layers - 1 or not windowed_layers(config)[layer]


def _has_keys_alone(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    alone = _KEYS.flag(config, "attention_k_eq_v") and _is_full(config, indices[0])
    return alone and not _shares(config, indices)


def _has_both(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _shares(config, indices) and not _has_keys_alone(config, indices)


def _has_keys(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not _shares(config, indices)


def _has_inputs(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return _KEYS.size(config, "hidden_size_per_layer_input") > 0


class _QueryKey(Interleaved):
    """A group's query heads, then its key head."""

    parts = ("q", "k")

    def source_shapes(self, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[int, ...]]:
        key = config.num_query_groups * config.kv_channels
        return [(shape[0] - key, *shape[1:]), (key, *shape[1:])]


def _layer(config: ModelConfig, layer: int) -> ModelConfig:
    """A layer's heads, and its MLP, which may be twice as wide where keys and values are shared."""
    reader = _KEYS.reader(config)
    stated = reader.mapping("per_layer_config")
    width, groups = config.kv_channels, config.num_query_groups
    if stated:
        key = next((key for key in stated if key.lstrip("0") == str(layer or "")), "")  # 05 of more than ten layers
        own = Reader(Reader(stated, "config.json's per_layer_config").mapping(key), "config.json's layer")
        width, groups = own.integer("head_dim") or width, own.integer("num_key_value_heads") or groups
    elif _is_full(config, layer):
        width = reader.integer("global_head_dim") or 512
        if reader.flag("attention_k_eq_v"):
            groups = reader.integer("num_global_key_value_heads") or groups
    for key, value in (("head_dim", width), ("num_key_value_heads", groups)):
        if not 0 < value < LARGEST or (key != "head_dim" and config.num_attention_heads % value):
            raise impossible(f"{key} of layer {layer}", "a size that the heads divide into", value)
    wide = _shares(config, (layer,)) and bool(reader.flag("use_double_wide_mlp"))
    ffn = config.ffn_hidden_size * (2 if wide else 1)
    return replace(config, kv_channels=width, num_query_groups=groups, ffn_hidden_size=ffn)


_SPARSE, _DENSE = has("num_moe_experts"), lacks("num_moe_experts")


def _norm(source: str, dense: str, sparse: str) -> tuple[Rule, Rule]:
    """A norm of a layer by its name there, and by those in Bridge's two kinds of layers."""
    return tuple(  # type: ignore[return-value]
        Rule((f"{_LAYER}.{source}.weight",), f"{_HUB}.{hub}", ("hidden",), when=when)
        for hub, when in ((dense, _DENSE), (sparse, _SPARSE))
    )


def _mlp(hub: str, when: Condition) -> tuple[Rule, ...]:
    return (
        Rule((f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"), f"{hub}.linear_fc1.weight",
             ("fc1", "hidden"), GATE_UP, when),
        Rule((f"{_LAYER}.mlp.down_proj.weight",), f"{hub}.linear_fc2.weight", ("hidden", "ffn"), when=when),
    )  # fmt: skip


def _attention(names: str, hub: str, shape: tuple[str, ...], **how: Any) -> Rule:
    source = tuple(f"{_LAYER}.self_attn.{name}.weight" for name in names.split())
    return Rule(source, f"{_HUB}.self_attention.{hub}.weight", shape, **how)


_EXPERT, _EXPERTS = f"{_LAYER}.experts.*", f"{_HUB}.mlp"
_RULES = (
    Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule(("model.embed_tokens_per_layer.weight",), "per_layer_embedding.weight", ("inputs-vocabulary", "all-inputs"),
         when=_has_inputs),
    Rule(("model.per_layer_model_projection.weight",), "per_layer_model_proj.weight", ("all-inputs", "hidden"),
         when=_has_inputs),
    Rule(("model.per_layer_projection_norm.weight",), "per_layer_proj_norm.weight", ("inputs",), when=_has_inputs),
    *(
        Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.{linear}.layer_norm_weight", ("hidden",),
             when=when)
        for linear, when in (("linear_qkv", _has_both), ("linear_qk", _has_keys_alone), ("linear_q", _shares))
    ),
    _attention("q_proj k_proj v_proj", "linear_qkv", ("qkv", "hidden"), operation=INTERLEAVED_QKV, when=_has_both),
    _attention("q_proj k_proj", "linear_qk", ("qk", "hidden"), operation=_QueryKey(), when=_has_keys_alone),
    _attention("q_proj", "linear_q", ("attention", "hidden"), when=_shares),
    _attention("q_norm", "q_layernorm", ("head",)),
    _attention("k_norm", "k_layernorm", ("head",), when=_has_keys),
    _attention("o_proj", "linear_proj", ("hidden", "attention")),
    *_norm("post_attention_layernorm", "post_self_attn_layernorm.weight",
           "self_attention.linear_proj.post_layernorm.weight"),
    *_norm("pre_feedforward_layernorm", "mlp.linear_fc1.layer_norm_weight", "pre_shared_expert_layernorm.weight"),
    *_norm("post_feedforward_layernorm", "post_mlp_layernorm.weight", "post_ffn_layernorm.weight"),
    *_mlp(_EXPERTS, _DENSE),
    *_mlp(f"{_EXPERTS}.shared_experts", _SPARSE),
    Rule((f"{_LAYER}.router.proj.weight",), f"{_EXPERTS}.router.weight", ("experts", "hidden"), when=_SPARSE),
    Rule((f"{_LAYER}.router.scale",), f"{_EXPERTS}.router.scale", ("hidden",), when=_SPARSE),
    Rule((f"{_LAYER}.router.per_expert_scale",), f"{_EXPERTS}.router.per_expert_scale", ("experts",), when=_SPARSE),
    Rule((f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"), f"{_EXPERTS}.experts.linear_fc1.weight*",
         ("expert-fc1", "hidden"), GATE_UP, _SPARSE),
    Rule((f"{_EXPERT}.down_proj",), f"{_EXPERTS}.experts.linear_fc2.weight*", ("hidden", "expert-ffn"), when=_SPARSE),
    *(
        Rule((f"{_LAYER}.{source}.weight",), f"{_HUB}.{hub}.weight", ("hidden",), when=_SPARSE)
        for source, hub in (
            ("pre_feedforward_layernorm_2", "pre_mlp_layernorm"),
            ("post_feedforward_layernorm_1", "mlp.post_shared_expert_layernorm"),
            ("post_feedforward_layernorm_2", "mlp.post_moe_layernorm"),
        )
    ),
    *(
        Rule((f"{_LAYER}.{name}.weight",), f"{_HUB}.{name}.weight", shape, when=_has_inputs)
        for name, shape in (
            ("per_layer_input_gate", ("inputs", "hidden")),
            ("per_layer_projection", ("hidden", "inputs")),
            ("post_per_layer_input_norm", ("hidden",)),
        )
    ),
    Rule((f"{_LAYER}.layer_scalar",), f"{_HUB}.layer_scalar", ("one",)),
    Rule(("model.norm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("lm_head.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip

_OWN = ("per_layer_", "scale", "scalar", "linear_qk.weight", "post_per_layer_input_norm.weight")
RULES = tuple(replace(rule, partition="alone") if any(own in rule.hub for own in _OWN) else rule for rule in _RULES)
"""What stock Megatron-Core has no modules for is divided between no ranks."""


class _Experts(Codec):
    """Experts, if layers have them beside their MLP."""

    hubs = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size")
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size", "enable_moe_block")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        if not reader.flag("enable_moe_block"):
            return dict.fromkeys(self.hubs)
        return {hub: reader.integer(key) for hub, key in zip(self.hubs, self.keys, strict=False)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        written = {key: getattr(config, hub) for hub, key in zip(self.hubs, self.keys, strict=False)}
        return {**written, "enable_moe_block": config.num_moe_experts is not None}


FAMILY = Family(
    name="gemma4",
    title="Gemma 4 (text)",
    rules=RULES,
    ignorable=tuple(
        (f"{_LAYER}.self_attn.{name}.weight", "a layer that takes another's keys and values has no use for its own")
        for name in ("k_proj", "v_proj", "k_norm", "v_norm")
    ),
    traits={
        **decoder.TRAITS, "activation": "gelu_tanh", "add_bias_linear": False, "qk_layernorm": True,
        "position_embedding_type": "rope_by_layer",
    },
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    layer=_layer,
    dimensions={
        "qk": lambda config: (config.num_attention_heads + config.num_query_groups) * config.kv_channels,
        "inputs": lambda config: _KEYS.size(config, "hidden_size_per_layer_input"),
        "all-inputs": lambda config: config.num_layers * _KEYS.size(config, "hidden_size_per_layer_input"),
        "inputs-vocabulary": lambda config: _KEYS.size(config, "vocab_size_per_layer_input"),
    },
    hugging_face=HuggingFace(
        model_types=(_TYPE,),
        text_parts={"gemma4_unified_text": _UNIFIED},
        architectures=("Gemma4ForCausalLM",),
        fields=(*LLAMA_FIELDS, Field("final_logit_softcapping", "final_logit_softcapping", "number", None, null=True)),
        activation_key="hidden_activation",
        codecs=(LayerWindow(AllBut(6), unset=512), RopeByLayer(), _Experts()),
        carried=frozenset({
            "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "vocab_size_per_layer_input",
            "hidden_size_per_layer_input", "global_head_dim", "num_global_key_value_heads", "per_layer_config",
            "use_bidirectional_attention",
        }),
        variants=(
            Variant(f"{_LAYER}.experts.gate_up_proj", (f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"), written=True),
            Variant(f"{_LAYER}.experts.down_proj", (f"{_EXPERT}.down_proj",), written=True),
        ),
    ),
)  # fmt: skip
