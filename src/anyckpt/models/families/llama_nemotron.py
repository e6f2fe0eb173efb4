"""Llama-Nemotron whose layers differ (DeciLM): Super 49B, Ultra 253B, Llama-3.1-Nemotron-51B.

A layer is Llama's, but its attention or its MLP may be left out, or be one matrix; query groups and widths are each
layer's own.  Models of the collection whose layers are alike (Nano 8B, 70B) are plain Llama.  Names and keys are those
of NVIDIA's ``modeling_decilm.py`` and ``block_config.py`` and of Megatron-Core 0.16's heterogeneous layers, a model of
which loads what is written here.

NeMo 2.5's and Megatron-Bridge 0.3.1's converters know of no replaced layers, and take the query groups of the first
layer for those of all (Llama-3.1-Nemotron-51B has both).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.layer_blocks import LayerBlock, parse, render
from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.apart import RemoteCode
from anyckpt.models.families.parts.fields import BIAS_OF_ALL, llama_fields_without
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Condition, Rule

_LAYER = "model.layers.*"
_HUB = "decoder.layers.*"
_CODE = "nvidia/Llama-3_3-Nemotron-Super-49B-v1"
_CLASSES = {
    "AutoConfig": "configuration_decilm.DeciLMConfig", "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}  # fmt: skip


def _blocks(config: ModelConfig) -> tuple[LayerBlock, ...]:
    if config.heterogeneous_blocks is None:
        raise MappingError(
            "the configuration does not say what each layer is", expected="heterogeneous_layers_config_encoded_json",
            remedy="choose --family llama if all layers are alike, else give a complete configuration with --config",
        )  # fmt: skip
    return config.heterogeneous_blocks


def _is(part: str, kind: str) -> Condition:
    return lambda config, indices: getattr(_blocks(config)[indices[0]], part) == kind


def _where_whole(rule: Rule) -> Rule:
    """Llama's rule, for layers that have the block."""
    part = "attention" if "self_attention" in rule.hub else "mlp" if ".mlp." in rule.hub else None
    if part is None:
        return rule
    is_whole, also = _is(part, "whole"), rule.when
    return replace(rule, when=lambda config, indices: is_whole(config, indices) and also(config, indices))


def _replaced(part: str, norm: str, matrix: str, hub: str) -> tuple[Rule, Rule]:
    """One matrix with a norm before it."""
    when = _is(part, "linear")
    return (
        Rule((f"{_LAYER}.{norm}.weight",), f"{_HUB}.{hub}.layer_norm_weight", ("hidden",), when=when),
        Rule((f"{_LAYER}.{matrix}.weight",), f"{_HUB}.{hub}.weight", ("hidden", "hidden"), when=when),
    )  # fmt: skip


RULES = (
    *map(_where_whole, decoder.RULES),
    *_replaced("attention", "input_layernorm", "self_attn.linear_attn", "self_attention"),
    *_replaced("mlp", "post_attention_layernorm", "mlp.linear_mlp", "mlp"),
)


def _layer(config: ModelConfig, index: int) -> ModelConfig:
    """A layer's own query groups and width."""
    block = _blocks(config)[index]
    return replace(
        config,
        num_query_groups=block.num_query_groups or config.num_query_groups,
        ffn_hidden_size=block.ffn_hidden_size or config.ffn_hidden_size,
    )


def _block_configs(config: ModelConfig) -> list[dict[str, Any]]:
    return [render(block, config.num_attention_heads, config.hidden_size) for block in _blocks(config)]


class _Blocks(Codec):
    """The layers; of the whole model, query groups are the first attention's and the width is the largest."""

    hubs = ("heterogeneous_blocks", "num_query_groups", "ffn_hidden_size")
    keys = ("block_configs",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        if heads < 1 or hidden < 1:
            raise MappingError(
                "config.json's num_attention_heads and hidden_size are not possible", found=(heads, hidden)
            )
        if found["add_bias_linear"]:
            raise MappingError("config.json has biases that no released model of family llama-nemotron has")
        blocks = parse(reader.values.get("block_configs"), heads, hidden)
        return {
            "heterogeneous_blocks": blocks,
            "num_query_groups": next((b.num_query_groups for b in blocks if b.num_query_groups), heads),
            "ffn_hidden_size": max((b.ffn_hidden_size or 0 for b in blocks), default=0) or 4 * hidden,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        blocks = _block_configs(config)
        for index, block in enumerate(blocks):
            if "ffn_hidden_size" in block["ffn"]:
                raise MappingError(
                    f"DeciLM has no word for the width of layer {index}", expected="a multiple of 256",
                    found=block["ffn"]["ffn_hidden_size"],
                )  # fmt: skip
        return {"block_configs": blocks, "intermediate_size": None, "num_key_value_heads": None}


def _encoded(config: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's layers; the keys besides ``block_configs`` are those that Megatron-LM compares arguments with."""
    values = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "hidden_act": "silu",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "rope_theta": whole(config.rotary_base),
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "block_configs": _block_configs(config),
    }
    return {"heterogeneous_block_specs": True, "heterogeneous_layers_config_encoded_json": json.dumps(values)}


def _megatron_keys(config: ModelConfig) -> dict[str, Any]:
    """Megatron-LM asks for a path, too, which it does not open where it has the JSON."""
    return {
        **_encoded(config),
        "heterogeneous_layers_config_path": "config.json",
        "use_rotary_position_embeddings": True,
        "group_query_attention": True,
    }


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    groups = {block.num_query_groups for block in _blocks(config)} - {None}
    if kind == "megatron-args" and (len(groups) > 1 or not config.rope_scaling):
        yield (
            "Megatron-LM's argument parser takes heterogeneous layers only with llama3-scaled rope and as many query "
            "groups in every layer: build the model with Megatron-Core's HeterogeneousTransformerConfig"
        )


class _Encoded(Codec):
    """NeMo 2's key of Megatron-Core's layers, which all its classes have and read, and these need."""

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        if not reader.values.get("heterogeneous_layers_config_encoded_json"):
            raise MappingError(
                "the NeMo 2 configuration has no heterogeneous_layers_config_encoded_json",
                remedy="give the model's config.json with --config",
            )
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        if config.rope_scaling is None or config.rope_scaling.get("rope_type") != "llama3":
            raise MappingError(
                "NeMo 2's Llama-Nemotron always scales rope as Llama 3.1", expected="rope_scaling of type llama3",
                found=config.rope_scaling, remedy="convert to megatron-core",
            )  # fmt: skip
        return _encoded(config)


FAMILY = Family(
    name="llama-nemotron",
    title="Llama-Nemotron Super, Ultra, 51B (DeciLM)",
    rules=RULES,
    ignorable=decoder.IGNORABLE,
    traits={**decoder.TRAITS, "add_bias_linear": False},
    features=frozenset({
        "heterogeneous_block_specs", "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json",
    }),
    recognise=lambda config: config.heterogeneous_blocks is not None,
    hugging_face=HuggingFace(
        model_types=("nemotron-nas",),
        architectures=("DeciLMForCausalLM",),
        defaults_of="llama",
        fields=(
            *llama_fields_without("ffn_hidden_size"),
            Field("ffn_hidden_size", "intermediate_size", default=0),
            BIAS_OF_ALL,
        ),
        codecs=(_Blocks(), RemoteCode(_CODE, _CLASSES)),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.llama_nemotron",
        model="LlamaNemotronModel",
        configs=("Llama31NemotronUltra253BConfig", "Llama33NemotronSuper49BConfig"),
        choose=lambda config: (
            "Llama33NemotronSuper49BConfig" if config.num_layers == 80 else "Llama31NemotronUltra253BConfig"
        ),
        codecs=(_Encoded(),),
    ),
    nemo1=False,
    megatron_keys=_megatron_keys,
    caveats=_caveats,
    layer=_layer,
)  # fmt: skip
