"""What models with gated delta nets share: gated attention, the nets, layers of further tokens; no family itself.

Of every few layers one has attention, whose output is multiplied by a gate that comes with the query, and the others a
gated delta net.  All norms store gamma - 1 but that of a net's output, which Megatron-Core has so, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Variant
from anyckpt.errors import MappingError
from anyckpt.indexing import Shape
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.experts import HUB, LAYER
from anyckpt.models.families.parts.fields import LLAMA_FIELDS, llama_fields_without
from anyckpt.models.language.delta_operations import GATED_QKV, ZERO_CENTRED
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import Operation
from anyckpt.models.language.rules import Dimension, Rule, has

_LINEAR, _FULL = "linear_attention", "full_attention"
_ATTENTION, _HUB = f"{LAYER}.self_attn", f"{HUB}.self_attention"
NET = f"{LAYER}.linear_attn"
_MTP, _HUB_MTP = "mtp.layers.0", "mtp.layers.0.transformer_layer"


def _is_linear(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return config.is_linear(indices[0])


def _is_full(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return not config.is_linear(indices[0])


ATTENTION = (
    Rule((f"{LAYER}.input_layernorm.weight",), f"{_HUB}.linear_qkv.layer_norm_weight", ("hidden",), when=_is_full),
    Rule(tuple(f"{name}.weight" for name in decoder.QUERY_KEY_VALUE), f"{_HUB}.linear_qkv.weight",
         ("gated-qkv", "hidden"), GATED_QKV, _is_full),
    *(
        Rule((f"{_ATTENTION}.{which}_norm.weight",), f"{_HUB}.{which}_layernorm.weight", ("head",), when=_is_full)
        for which in ("q", "k")
    ),
    Rule((f"{_ATTENTION}.o_proj.weight",), f"{_HUB}.linear_proj.weight", ("hidden", "attention"), when=_is_full),
)  # fmt: skip


def nets(sources: tuple[str, ...], operation: Operation) -> tuple[Rule, ...]:
    """A layer's gated delta net, by the names of its input projections and how they become Megatron's one."""
    return (
        Rule((f"{LAYER}.input_layernorm.weight",), f"{_HUB}.in_proj.layer_norm_weight", ("hidden",), when=_is_linear),
        Rule(tuple(f"{NET}.{name}.weight" for name in sources), f"{_HUB}.in_proj.weight", ("delta-in", "hidden"),
             operation, _is_linear),
        Rule((f"{NET}.conv1d.weight",), f"{_HUB}.conv1d.weight", ("delta-conv", "one", "delta-kernel"),
             when=_is_linear),
        Rule((f"{NET}.dt_bias",), f"{_HUB}.dt_bias", ("delta-heads",), when=_is_linear),
        Rule((f"{NET}.A_log",), f"{_HUB}.A_log", ("delta-heads",), when=_is_linear),
        Rule((f"{NET}.norm.weight",), f"{_HUB}.out_norm.weight", ("delta-head",), ZERO_CENTRED, _is_linear),
        Rule((f"{NET}.out_proj.weight",), f"{_HUB}.out_proj.weight", ("hidden", "delta-values"), when=_is_linear),
    )  # fmt: skip


def further(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The one layer that predicts further tokens, which is as others with attention, by a layer's rules."""
    there = has("mtp_num_layers")
    outside = (
        ("mtp.pre_fc_norm_embedding.weight", "enorm.weight", ("hidden",)),
        ("mtp.pre_fc_norm_hidden.weight", "hnorm.weight", ("hidden",)),
        ("mtp.fc.weight", "eh_proj.weight", ("hidden", "twice-hidden")),
        ("mtp.norm.weight", "final_layernorm.weight", ("hidden",)),
    )
    return (
        *(Rule((source,), f"mtp.layers.0.{hub}", shape, when=there) for source, hub, shape in outside),
        *(
            replace(
                rule,
                source=tuple(name.replace(LAYER, _MTP, 1) for name in rule.source),
                hub=rule.hub.replace(HUB, _HUB_MTP, 1),
                when=there,
                axes=rule.axes[1:],
            )
            for rule in (*ATTENTION, *rules)
        ),
    )


def further_variants(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Spellings of that layer's tensors, by those of the others'."""
    return tuple(
        replace(
            variant,
            stored=variant.stored.replace(LAYER, _MTP, 1),
            names=tuple(name.replace(LAYER, _MTP, 1) for name in variant.names),
        )
        for variant in variants
    )


def key_rows(config: ModelConfig) -> int:
    """Rows of a net's queries, or keys."""
    return (config.linear_num_key_heads or 0) * (config.linear_key_head_dim or 0)


def value_rows(config: ModelConfig) -> int:
    """Rows of a net's values, or of z."""
    return (config.linear_num_value_heads or 0) * (config.linear_value_head_dim or 0)


def value_heads(config: ModelConfig) -> int:
    """Heads of a net's values."""
    return config.linear_num_value_heads or 0


DIMENSIONS: Mapping[str, Dimension] = {
    "gated-qkv": lambda config: 2 * (config.num_attention_heads + config.num_query_groups) * config.kv_channels,
    "delta-in": lambda config: 2 * (key_rows(config) + value_rows(config) + value_heads(config)),
    "delta-conv": lambda config: 2 * key_rows(config) + value_rows(config),
    "delta-kernel": lambda config: config.linear_conv_kernel_dim or 0,
    "delta-heads": value_heads,
    "delta-head": lambda config: config.linear_value_head_dim or 0,
    "delta-values": value_rows,
    "twice-hidden": lambda config: 2 * config.hidden_size,
}

FIELDS = (
    Field("linear_conv_kernel_dim", "linear_conv_kernel_dim"),
    Field("linear_key_head_dim", "linear_key_head_dim"),
    Field("linear_value_head_dim", "linear_value_head_dim"),
    Field("linear_num_key_heads", "linear_num_key_heads"),
    Field("linear_num_value_heads", "linear_num_value_heads"),
    Field("mtp_num_layers", "mtp_num_hidden_layers", "count", None, terse=True),
)

TRAITS = {
    **decoder.TRAITS,
    "layernorm_zero_centered_gamma": True,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "attention_output_gate": True,
}
FEATURES = frozenset({"experimental_attention_variant", "attention_output_gate", "mtp_num_layers"})
KEYS = frozenset({"attn_output_gate", "mamba_ssm_dtype", "mtp_use_dedicated_embeddings", "mlp_only_layers"})
"""Keys of published models that say what all of them are."""


class NetLayers(Codec):
    """Which layers have a net: in a list, or all but every so many."""

    hubs = ("linear_attention_freq",)
    keys = ("layer_types", "full_attention_interval")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        layers = layers_of(found["num_layers"])
        words = reader.values.get("layer_types")
        if words is None:
            every = reader.integer("full_attention_interval") or 4
            return {"linear_attention_freq": tuple(int((layer + 1) % every != 0) for layer in layers)}
        if not isinstance(words, list) or len(words) != len(layers) or not all(w in (_LINEAR, _FULL) for w in words):
            raise MappingError(
                "config.json's layer_types is not that of the model",
                expected=f"{len(layers)} of {_LINEAR} or {_FULL}", found=repr(words)[:80],
            )  # fmt: skip
        return {"linear_attention_freq": tuple(int(word == _LINEAR) for word in words)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        layers = config.linear_attention_freq or (0,) * config.num_layers
        every = layers.index(0) + 1 if 0 in layers else len(layers) + 1
        regular = layers == tuple(int((layer + 1) % every != 0) for layer in range(len(layers)))
        return {
            "layer_types": [_LINEAR if linear else _FULL for linear in layers],
            **({"full_attention_interval": every} if regular else {}),
        }


def refine(config: ModelConfig, shapes: Mapping[str, Shape]) -> ModelConfig:
    """Whether there is a layer of further tokens say its tensors: no key does of Qwen3-Next."""
    if not shapes:
        return config
    return replace(config, mtp_num_layers=1 if "mtp.layers.0.eh_proj.weight" in shapes else None)


_EXPERT_FIELDS = (
    *sparse.fields("num_experts"),
    Field("moe_ffn_hidden_size", "moe_intermediate_size"),
    Field("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
)


def family(
    name: str,
    title: str,
    model_type: str,
    architecture: str,
    *,
    nets: tuple[Rule, ...],
    mlp: tuple[Rule, ...],
    dense: tuple[Rule, ...] = (),
    traits: Mapping[str, Any],
    codecs: tuple[Codec, ...] = (),
    has_width: bool = True,
) -> Family:
    """A family of such models.

    Args:
        name: its name.
        title: for people.
        model_type: as transformers has it.
        architecture: transformers' class.
        nets: rules of a layer's net.
        mlp: rules of a layer's MLP or experts, as the layer of further tokens has them, too.
        dense: rules of the MLP of layers without experts, where others have them.
        traits: what the family's models have besides those that all such models have.
        codecs: rows of its configuration besides that of the nets' layers.
        has_width: whether the configuration says how wide a dense MLP is.
    """
    has_experts = any(".experts." in rule.hub for rule in mlp)
    fields = LLAMA_FIELDS if has_width else llama_fields_without("ffn_hidden_size")
    variants = (*sparse.STACKED, *further_variants(sparse.STACKED)) if has_experts else ()
    return Family(
        name=name,
        title=title,
        rules=(*sparse.LEADING, *ATTENTION, *nets, *dense, *mlp, *further(mlp), *sparse.TRAILING),
        traits={**TRAITS, **traits},
        features=FEATURES | ({"num_moe_experts", "num_experts"} if has_experts else set()),
        recognise=lambda config: (
            config.linear_attention_freq is not None and (config.num_moe_experts is not None) == has_experts
        ),
        nemo1=False,
        refine=refine,
        dimensions=DIMENSIONS,
        hugging_face=HuggingFace(
            model_types=(model_type,),
            architectures=(architecture,),
            fields=(*fields, *(_EXPERT_FIELDS if has_experts else ()), *FIELDS),
            rotary_percent=0.25,
            codecs=(*codecs, NetLayers()),
            keys=KEYS,
            variants=variants,
        ),
    )
