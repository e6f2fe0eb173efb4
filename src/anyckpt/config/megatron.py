"""Megatron-LM's arguments, as it stores them in a checkpoint's ``args`` (names as of Megatron-Core 0.16)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from anyckpt.config.block_keys import block_sizes, parse_blocks, parse_yarn, render_blocks, render_yarn
from anyckpt.config.encoder_keys import SOFTMAX_SCALE, parse_encoders, render_encoders, stack_sizes
from anyckpt.config.fields import OPTIONAL, Field, four_widths, render_changed, render_fields, share_of_a_head
from anyckpt.config.model import PART_OF, WHOLE, WHOLE_NAMES, ModelConfig, check, whole
from anyckpt.config.other_targets import other_targets
from anyckpt.config.own_part import any_text_part
from anyckpt.config.reader import Reader
from anyckpt.config.rope_scaling import from_factors, to_factors
from anyckpt.config.spellings import Spellings
from anyckpt.errors import MappingError

_SIZES = (
    Field("num_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "ffn_hidden_size", default=four_widths),
    Field("num_attention_heads", "num_attention_heads"),
    Field("kv_channels", "kv_channels", default=share_of_a_head),
    Field("padded_vocab_size", "padded_vocab_size", default=None),
    Field("make_vocab_size_divisible_by", "make_vocab_size_divisible_by", default=128),
)
_OTHERS = (
    Field("max_position_embeddings", "max_position_embeddings", default=None),
    Field("vocab_size", "vocab_size", default=None),
    Field("normalization", "normalization", "text", "LayerNorm"),
    Field("layernorm_zero_centered_gamma", "apply_layernorm_1p", "flag", False),
    Field("layernorm_epsilon", "norm_epsilon", "number", 1e-5, ("layernorm_epsilon",)),
    Field("add_qkv_bias", "add_qkv_bias", "flag", False),
    Field("qk_layernorm", "qk_layernorm", "flag", False),
    Field("position_embedding_type", "position_embedding_type", "text", "learned_absolute"),
    Field("rotary_base", "rotary_base", "number", 10000.0),
    Field("rotary_percent", "rotary_percent", "number", 1.0),
    Field("rotary_interleaved", "rotary_interleaved", "flag", False),
    Field("init_method_std", "init_method_std", "number", 0.02),
    Field("attention_dropout", "attention_dropout", "number", 0.1),
    Field("hidden_dropout", "hidden_dropout", "number", 0.1),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Token ids are ours: Megatron-LM gets them from the tokenizer and ignores these."""

_POSITIONS = ("rope", "learned_absolute", "mrope", "relative", "yarn", "none")
_WHAT = "checkpoint's args"
_GATED = ("swiglu", "quick_geglu", "gated_linear_unit", "geglu")
"""The last is of forks such as MindSpeed."""
_DEFAULTS = {"kv_lora_rank": 32}
"""Where Megatron-LM's arguments and ``MLATransformerConfig`` differ."""
_WHOLE = "hf_config"
"""An argument of ours: ``config.json`` of the larger model whose text part the arguments describe."""
_NAMES = "hf_names"
"""Another: what the names of that model's parts begin with, where its type does not tell."""


def has_own_modules(config: ModelConfig) -> bool:
    """Whether NeMo 1 has the model only in its own modules: Megatron-Core has no alibi."""
    return config.position_embedding_type == "alibi"


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide shapes, as far as the arguments say them (see ``of_ranks``).

    Raises:
        MappingError: an argument is of the wrong type.
    """
    reader = Reader(config, _WHAT)
    found = reader.fields(_SIZES, {}, complete=False)
    found |= stack_sizes(reader, found)
    grouped = reader.flag("group_query_attention")
    groups = reader.integer("num_query_groups") if grouped is not False else None
    return {
        **found,
        "num_query_groups": groups if groups and (grouped or groups > 1) else found["num_attention_heads"],
        "gated_linear_unit": any([*map(reader.flag, _GATED), reader.text("glu_activation")]),
        "share_embeddings_and_output_weights": not reader.flag("untie_embeddings_and_output_weights"),
        **block_sizes(reader, _DEFAULTS, found),
    }


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration, of no family yet.

    Raises:
        MappingError: an argument is missing or of the wrong type.
    """
    reader = Reader(config, _WHAT)
    fields = sizes(config)
    reader.require(_SIZES, fields)
    fields |= reader.fields((*_OTHERS, *OPTIONAL), {})
    larger = _whole(reader)
    if larger and fields["position_embedding_type"] == "mrope":  # which differs for pictures alone
        fields["position_embedding_type"] = "rope"
    fields |= parse_encoders(reader, fields)
    fields |= parse_blocks(reader, {}, fields)
    yarn = parse_yarn(reader, {}, fields)
    no_bias, bias = reader.flag("disable_bias_linear"), reader.flag("add_bias_linear")
    rope = {}
    if reader.flag("use_rope_scaling"):
        rope = {"scale_factor": reader.number("rope_scaling_factor") or 8.0}
    return check(
        ModelConfig(
            **fields,
            family="",
            add_bias_linear=bias if bias is not None else not no_bias,
            activation=_activation(reader),
            window_size=reader.pair("window_size"),
            rope_scaling=yarn or from_factors(rope, reader.number("rotary_seq_len_interpolation_factor")),
            dtype=_dtype(reader),
            extra={"features": reader.features(), **larger},
        )
    )


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """Arguments with which Megatron-LM builds the model, at tensor and pipeline parallel size 1.

    Raises:
        MappingError: Megatron-Core has no such models, or no such rope scaling.
    """
    if not family.megatron:
        raise MappingError(
            f"Megatron-Core has no models of family {family.name}",
            remedy=other_targets(family, config, "Megatron-Core"),
        )
    yarn = render_yarn(family, config, "Megatron-Core")
    plain = config.rope_scaling if yarn is None else None
    factors, interpolation = to_factors(plain, "Megatron-Core", fixed=True)
    if config.position_embedding_type not in _POSITIONS:
        raise MappingError(
            "Megatron-Core has no such position embedding",
            expected=f"one of {', '.join(_POSITIONS)}",
            found=config.position_embedding_type,
            remedy=other_targets(family, config, "Megatron-Core"),
        )
    arguments: dict[str, Any] = {
        **render_fields((*_SIZES, *_OTHERS), config),
        **render_changed(OPTIONAL, config),
        "padded_vocab_size": config.rows,
        "rotary_base": whole(config.rotary_base),
        "seq_length": config.max_position_embeddings,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "swiglu": config.gated_linear_unit and config.activation == "silu",
        "squared_relu": config.activation == "squared_relu",
        "openai_gelu": config.activation == "gelu_tanh",
        "gated_linear_unit": config.gated_linear_unit,
        "quick_geglu": config.activation == "quick_gelu" and config.gated_linear_unit,
        "add_bias_linear": config.add_bias_linear,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "use_rope_scaling": bool(factors),
        "rope_scaling_factor": factors.get("scale_factor", 8.0),
        "rotary_seq_len_interpolation_factor": interpolation,
        "window_size": list(config.window_size) if config.window_size else None,
        "params_dtype": None if config.dtype is None else f"torch.{config.dtype}",
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        "use_mcore_models": True,
        "transformer_impl": "transformer_engine",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "hf_model_type": family.hugging_face.model_types[0],
        **_render_whole(config),
        **render_blocks(config, "num_experts"),
        **render_encoders(config),
        **(yarn or {}),
        **family.megatron_keys(config),
    }
    if config.query_pre_attn_scalar is not None:
        arguments |= SOFTMAX_SCALE.write(config, notes)
    if config.gated_linear_unit and not (arguments["swiglu"] or arguments["quick_geglu"]):
        notes.append(
            f"Megatron-LM has no argument for a gated {config.activation}: build the model with gated_linear_unit and "
            "that activation_func in its TransformerConfig"
        )
    if config.activation not in ("gelu", *(name for name, key in _ARGUMENTS.items() if arguments[key])):
        arguments["activation"] = config.activation
        if not config.gated_linear_unit:
            notes.append(
                f"Megatron-LM has no argument for {config.activation}: build the model with that activation_func in "
                "its TransformerConfig"
            )
    return arguments


_ARGUMENTS = {
    "silu": "swiglu",
    "squared_relu": "squared_relu",
    "gelu_tanh": "openai_gelu",
    "quick_gelu": "quick_geglu",
}


def _render_whole(config: ModelConfig) -> dict[str, Any]:
    """What a larger model, of which this one is the text part, makes of the arguments."""
    if WHOLE not in config.extra:
        return {}
    rope = any_text_part(config.extra[WHOLE])
    stated = rope.get("rope_parameters") or rope.get("rope_scaling")
    sections = stated.get("mrope_section") if isinstance(stated, Mapping) else None
    positions = {} if sections is None else {"position_embedding_type": "mrope", "mrope_section": sections}
    names = {_NAMES: json.dumps(config.extra[WHOLE_NAMES])} if WHOLE_NAMES in config.extra else {}
    return {_WHOLE: json.dumps(config.extra[WHOLE]), **names, **positions}


def _whole(reader: Reader) -> dict[str, Any]:
    """What the arguments say of the larger model of which this one is the text part."""
    whole = _object(reader, _WHOLE)
    if whole is None:
        return {}
    names = _object(reader, _NAMES)
    if names is not None and not _are_names(names):
        raise MappingError(f"the {_WHAT} have an {_NAMES} of the wrong form", found=repr(names)[:80])
    told = {} if names is None else {WHOLE_NAMES: names}
    return {PART_OF: str(whole.get("model_type")), WHOLE: whole, **told}


def _object(reader: Reader, key: str) -> dict[str, Any] | None:
    """An object of JSON in an argument."""
    text = reader.text(key)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MappingError(f"the {_WHAT} have an {key} that is no JSON", found=text[:80]) from error
    if not isinstance(value, dict):
        raise MappingError(f"the {_WHAT} have an {key} that is no object", found=text[:80])
    return value


def _are_names(names: Mapping[str, Any]) -> bool:
    parts = names.get("parts")
    texts = [names.get("text"), names.get("head"), *(parts.values() if isinstance(parts, dict) else [None])]
    return all(isinstance(text, str) for text in texts)


def _activation(reader: Reader) -> str:
    stated = reader.text("activation")  # ours, for what no argument says
    if stated in ("relu", "quick_gelu", "silu"):
        return stated
    if reader.flag("swiglu"):
        return "silu"
    if reader.flag("squared_relu"):
        return "squared_relu"
    if reader.flag("quick_geglu"):
        return "quick_gelu"
    return "gelu_tanh" if reader.flag("openai_gelu") else "gelu"


def _dtype(reader: Reader) -> str | None:
    stated = reader.values.get("params_dtype")
    text = str(stated) if stated is not None else ""
    for name in ("bfloat16", "float16", "float32"):
        if text.rstrip(">'\"").endswith(f".{name}") or text == name:
            return name
    return "bfloat16" if reader.flag("bf16") else "float16" if reader.flag("fp16") else None
