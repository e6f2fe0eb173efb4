"""NeMo's configurations: ``model_config.yaml`` of NeMo 1 and the configuration classes of NeMo 2.

NeMo 1's keys and defaults are those of ``MegatronGPTModel`` up to NeMo 2.0 (``megatron_llama_config.yaml``); NeMo 2's
are fields of ``GPTConfig`` and its children in NeMo 2.5.  Functions and element types of NeMo 2 are spelled as in
``model.yaml``: ``{_target_: torch.nn.functional.silu, _call_: false}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.block_keys import block_sizes, parse_blocks, parse_yarn, render_blocks, render_yarn
from anyckpt.config.encoder_keys import (
    is_encoder_decoder,
    parse_encoders,
    render_encoders,
    sections,
    stack_sizes,
    with_encoder,
)
from anyckpt.config.megatron import has_own_modules
from anyckpt.config.model import (
    OPTIONAL,
    Field,
    ModelConfig,
    Reader,
    as_many_as_heads,
    check,
    four_widths,
    render_fields,
    render_optional,
    share_of_a_head,
    whole,
)
from anyckpt.config.other_targets import other_targets
from anyckpt.config.rope_scaling import from_factors, to_factors
from anyckpt.config.spellings import NeMo2, Spellings
from anyckpt.errors import MappingError

_SIZES = (
    Field("num_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "ffn_hidden_size", default=four_widths),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_query_groups", "num_query_groups", default=as_many_as_heads),
    Field("kv_channels", "kv_channels", default=share_of_a_head),
    Field("share_embeddings_and_output_weights", "share_embeddings_and_output_weights", "flag", True),
    Field("make_vocab_size_divisible_by", "make_vocab_size_divisible_by", default=128),
)
_SHARED = (
    Field("layernorm_epsilon", "layernorm_epsilon", "number", 1e-5),
    Field("init_method_std", "init_method_std", "number", 0.02),
    Field("hidden_dropout", "hidden_dropout", "number", 0.1),
    Field("attention_dropout", "attention_dropout", "number", 0.1),
    Field("position_embedding_type", "position_embedding_type", "text", "learned_absolute"),
    Field("rotary_base", "rotary_base", "number", 10000.0),
    Field("rotary_interleaved", "rotary_interleaved", "flag", False),
    Field("qk_layernorm", "qk_layernorm", "flag", False),
)

_NEMO1_FIELDS = (
    *_SHARED,
    Field("rotary_percent", "rotary_percentage", "number", 1.0),
    Field("add_bias_linear", "bias", "flag", True, ("add_bias_linear",)),
    Field("add_qkv_bias", "qkv_bias", "flag", False),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Token ids (and ``vocab_size``, the true one) are ours: NeMo 1 gets them from the tokenizer and ignores these."""

_NEMO2_FIELDS = (
    *_SIZES,
    *_SHARED,
    Field("max_position_embeddings", "seq_length", default=None),
    Field("padded_vocab_size", "vocab_size", default=None),
    Field("rotary_percent", "rotary_percent", "number", 1.0),
    Field("normalization", "normalization", "text", "LayerNorm"),
    Field("layernorm_zero_centered_gamma", "layernorm_zero_centered_gamma", "flag", False),
    Field("gated_linear_unit", "gated_linear_unit", "flag", False),
    Field("add_bias_linear", "add_bias_linear", "flag", True),
    Field("add_qkv_bias", "add_qkv_bias", "flag", False),
)
"""``vocab_size`` of NeMo 2, where it is not null, is the number of rows: nothing is padded any more."""

NEMO1_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that a decoder-only NeMo 1 checkpoint names."""

_NORMS = {
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
    "rmsnorm": ("RMSNorm", False),
    "rmsnorm1p": ("RMSNorm", True),
}
_ACTIVATIONS = {
    "fast-swiglu": ("silu", True),
    "swiglu": ("silu", True),
    "fast-geglu": ("gelu", True),
    "geglu": ("gelu", True),
    "quick-geglu": ("quick_gelu", True),
    "fast-reglu": ("relu", True),
    "reglu": ("relu", True),
    "gelu": ("gelu", False),
    "approx-gelu": ("quick_gelu", False),
    "openai-gelu": ("gelu_tanh", False),
    "relu": ("relu", False),
    "squared-relu": ("squared_relu", False),
}
"""NeMo 1 takes the MLP to be gated if the name ends so."""
_CORES_WORDS = {"add_bias_linear": "bias", "add_qkv_bias": "qkv_bias"}
_LATENT_DEFAULTS = {"q_lora_rank": 512}
"""``MLATransformerConfig``'s, which NeMo 1 builds."""
_POSITIONS = ("rope", "learned_absolute", "yarn", "mrope", "relative", "none")
_NEMO1 = "model_config.yaml"
_PRECISIONS = {"bf16": "bfloat16", "16": "float16", "fp16": "float16", "32": "float32"}
_FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "gelu_tanh": "nemo.collections.llm.fn.activation.openai_gelu",
    "quick_gelu": "nemo.collections.llm.fn.activation.quick_gelu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
}
_LLAMA31 = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
_CORES_SCALING = "rope_scaling"
"""Of classes that scale rope as Megatron-Core does, where only the factor is free, and not themselves."""


# -- NeMo 1 --------------------------------------------------------------------------------------------------


def nemo1_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide shapes, as far as the configuration says them (see ``of_ranks``).

    Raises:
        MappingError: a key is of the wrong type.
    """
    reader = Reader(unwrapped(config), _NEMO1)
    found = reader.fields(_SIZES, {}, complete=False)
    found |= stack_sizes(reader, found)
    stated = reader.flag("gated_linear_unit")
    return {
        **found,
        "padded_vocab_size": reader.integer("override_vocab_size") or reader.integer("padded_vocab_size"),
        "gated_linear_unit": _activation(reader).endswith("glu") if stated is None else stated,
        **block_sizes(reader, _LATENT_DEFAULTS, found),
    }


def parse_nemo1(config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration from ``model_config.yaml`` or ``hparams.yaml``, of no family yet.

    Raises:
        MappingError: a key is missing, of the wrong type or of an unknown value.
    """
    reader = Reader(unwrapped(config), _NEMO1)
    fields = nemo1_sizes(config)
    reader.require(_SIZES, fields)
    fields |= reader.fields((*_NEMO1_FIELDS, *OPTIONAL), {})
    fields |= parse_encoders(reader, fields)
    fields |= parse_blocks(reader, {}, fields)
    spelled = (reader.text("normalization") or "layernorm").lower()
    activation = _activation(reader)
    for key, value, table in (("normalization", spelled, _NORMS), ("activation", activation, _ACTIVATIONS)):
        if value not in table:
            raise MappingError(
                f"model_config.yaml's {key} is unknown", expected=f"one of {', '.join(table)}", found=value
            )
    norm, zero_centered = _NORMS[spelled]
    function, _ = _ACTIVATIONS[activation]
    if function == "gelu" and reader.flag("openai_gelu"):
        function = "gelu_tanh"
    factors = {}
    if reader.flag("scale_positional_embedding"):
        factors = {"scale_factor": reader.number("scale_factor") or 8.0}
    precision = str(reader.values.get("precision", "")).partition("-")[0]
    return check(
        ModelConfig(
            **fields,
            family="",
            max_position_embeddings=reader.integer("max_position_embeddings") or reader.integer("encoder_seq_length"),
            vocab_size=reader.integer("vocab_size") or reader.integer("override_vocab_size"),
            normalization=norm,
            layernorm_zero_centered_gamma=zero_centered or bool(reader.flag("layernorm_zero_centered_gamma")),
            activation=function,
            window_size=reader.pair("window_size"),
            rope_scaling=from_factors(factors, reader.number("seq_len_interpolation_factor")),
            dtype=_PRECISIONS.get(precision),
            extra={"features": reader.features()},
        )
    )


def render_nemo1(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``model_config.yaml`` without tokenizer, for tensor and pipeline parallel size 1.

    Raises:
        MappingError: NeMo 1 cannot express the configuration.
    """
    if not family.nemo1:
        raise MappingError(
            f"NeMo 1 has no models of family {family.name}",
            remedy=other_targets(family, config, "NeMo 1"),
        )
    factors, interpolation = to_factors(config.rope_scaling, "NeMo 1", fixed=True)
    if factors and factors["scale_factor"] != 8.0:
        notes.append(
            f"NeMo 1 scales rope by 8; the model needs {factors['scale_factor']:g}, which is written as scale_factor "
            "but releases before it know no such key"
        )
    norms = {value: key for key, value in _NORMS.items()} | {("RMSNorm", True): "rmsnorm"}
    activations = {value: key for key, value in reversed(_ACTIVATIONS.items())} | {("gelu_tanh", True): "geglu"}
    activation = activations.get((config.activation, config.gated_linear_unit))
    if activation is None:
        raise MappingError(
            "NeMo 1 has no such activation",
            expected=f"one of {', '.join(_ACTIVATIONS)}",
            found=f"{'gated ' if config.gated_linear_unit else ''}{config.activation}",
        )
    rendered: dict[str, Any] = {
        "mcore_gpt": not has_own_modules(config),
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **{
            key: value
            for key, value in render_fields((*_SIZES, *_NEMO1_FIELDS), config).items()
            if not _is_absent(key, value)
        },
        "rotary_base": whole(config.rotary_base),
        "vocab_size": config.vocab_size,
        "override_vocab_size": config.rows,
        "normalization": norms[config.normalization, config.layernorm_zero_centered_gamma],
        "activation": activation,
        **render_optional(config),
        "use_scaled_init_method": True,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "transformer_block_type": "pre_ln",
        "seq_len_interpolation_factor": interpolation,
        "transformer_engine": not has_own_modules(config),
        "megatron_amp_O2": False,
        "precision": {"bfloat16": "bf16", "float16": 16}.get(config.dtype or "", 32),
        "hf_model_type": family.hugging_face.model_types[0],
        "target": NEMO1_TARGET,
        **render_blocks(config),
        **render_encoders(config),
    }
    if factors:
        rendered |= {"scale_positional_embedding": True, "scale_factor": whole(factors["scale_factor"])}
    if config.window_size is not None:
        rendered["window_size"] = list(config.window_size)
    if config.layernorm_zero_centered_gamma:
        rendered["layernorm_zero_centered_gamma"] = True
    if activation == "geglu" and config.activation == "gelu_tanh":
        rendered["openai_gelu"] = True
    if config.query_pre_attn_scalar is not None:
        rendered["softmax_scale"] = config.query_pre_attn_scalar**-0.5
    if config.encoder_num_layers is not None:
        rendered |= sections(rendered, config)
    return {**rendered, **family.nemo1_keys(config)}


def _is_absent(key: str, value: Any) -> bool:
    return value is None and key.endswith("_token_id")


def _activation(reader: Reader) -> str:
    return (reader.text("activation") or "gelu").lower()


def unwrapped(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's part of a configuration, as NeMo 1 takes it.

    Training scripts keep it under ``model``, ``hparams.yaml`` under ``cfg``.  An encoder-decoder's sections are spelled
    as Megatron-LM's arguments, and what ``mcore_customization_config`` says in Megatron-Core's words is put on top.
    """
    part = _part(config)
    return _customized(with_encoder(config if part is None else config[part]))


def _part(config: Mapping[str, Any]) -> str | None:
    """The key under which the model's part is, None for none."""
    for key in ("cfg", "model"):
        inner = config.get(key)
        if (
            isinstance(inner, Mapping)
            and "num_layers" not in config
            and ("num_layers" in inner or is_encoder_decoder(inner))
        ):
            return key
    return None


def _customized(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Also without ``gated_linear_unit`` where NeMo ignores it."""
    section = config.get("mcore_customization_config")
    custom: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
    if not custom and "gated_linear_unit" not in config:
        return config
    stated = {key: value for key, value in config.items() if key != "gated_linear_unit"}
    return {**stated, **{_CORES_WORDS.get(key, key): value for key, value in custom.items()}}


def restated(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values of some keys of its model's part."""
    part = _part(config)
    return {**config, **keys} if part is None else {**config, part: {**config[part], **keys}}


# -- NeMo 2 --------------------------------------------------------------------------------------------------


def nemo2_class(config: Mapping[str, Any]) -> str | None:
    """Name of the configuration class, without its module."""
    target = _inner(config).get("_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else None


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("config")
    return inner if isinstance(inner, Mapping) and "_target_" in inner else config


def parse_nemo2(family: Spellings, config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration from ``model.yaml``, or from the configuration in it or in ``io.json``.

    Raises:
        MappingError: a field is missing, of the wrong type or of an unknown value.
    """
    reader = Reader(_inner(config), "NeMo 2 configuration")
    known = family.nemo2 or NeMo2("", "", ("LlamaConfig",), lambda config: "")
    defaults = known.class_defaults(nemo2_class(config) or "")
    table = (*_NEMO2_FIELDS, *OPTIONAL[:1], *known.fields)
    fields = reader.fields([entry for entry in table if entry.hub not in known.own], defaults)
    fields |= block_sizes(reader, defaults, fields)
    fields |= parse_blocks(reader, defaults, fields)
    yarn = parse_yarn(reader, defaults, fields)
    window = None if "window_size" in known.own else _nemo2_window(reader, defaults)
    factors = {key: reader.number(key) or defaults[key] for key in _LLAMA31 if key in defaults}
    if _CORES_SCALING in defaults:
        stated = reader.flag(_CORES_SCALING)
        if defaults[_CORES_SCALING] if stated is None else stated:
            factors = {"scale_factor": reader.number("rope_scaling_factor") or defaults.get("rope_scaling_factor", 8.0)}
    return check(
        ModelConfig(
            **{
                **fields,
                "family": family.name,
                "vocab_size": fields["padded_vocab_size"],
                "activation": _function(reader, defaults),
                "window_size": window,
                "rope_scaling": yarn or from_factors(factors, reader.number("seq_len_interpolation_factor")),
                "dtype": _nemo2_dtype(reader),
                "extra": {"features": reader.features()},
                **known.read(reader, defaults),
            }
        )
    )


def render_nemo2(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """The model part of ``model.yaml`` without tokenizer: ``_target_`` and ``config``, for parallel sizes of 1.

    Raises:
        MappingError: NeMo 2 cannot express the configuration.
    """
    if family.nemo2 is None:
        raise MappingError(
            f"NeMo 2 has no models of family {family.name}",
            remedy=other_targets(family, config, "NeMo 2"),
        )
    yarn = render_yarn(family, config, "NeMo 2")
    factors, interpolation = to_factors(config.rope_scaling if yarn is None else None, "NeMo 2", fixed=False)
    _check_nemo2_has(family, config)
    name = family.nemo2.choose(config)
    dtype = config.dtype or "float32"
    rendered: dict[str, Any] = {
        "_target_": f"{family.nemo2.module}.{name}",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **render_fields((*_NEMO2_FIELDS, *family.nemo2.fields), config),
        "vocab_size": config.rows,
        "rotary_base": whole(config.rotary_base),
        "activation_func": {"_target_": _FUNCTIONS[config.activation], "_call_": False},
        "seq_len_interpolation_factor": interpolation,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
        **render_blocks(config),
        **(yarn or {}),
    }
    defaults = family.nemo2.class_defaults(name)
    if _CORES_SCALING in defaults:
        to_factors(config.rope_scaling, "Megatron-Core", fixed=True)
        rendered |= {_CORES_SCALING: bool(factors), "rope_scaling_factor": whole(factors.get("scale_factor", 8.0))}
        factors = {}
    if factors and "scale_factor" not in defaults:
        raise MappingError(
            f"NeMo 2's {name} cannot express this rope scaling",
            expected="linear, or none",
            found=dict(config.rope_scaling or {}),
            remedy="convert with --config of a configuration without it, and set it up in NeMo yourself",
        )
    if factors:
        rendered |= {key: whole(value) for key, value in factors.items()}
    if config.window_attn_skip_freq is not None:
        rendered |= render_fields(OPTIONAL[:1], config)
    if config.window_size is not None or defaults.get("window_size") is not None:
        rendered["window_size"] = None if config.window_size is None else list(config.window_size)
    if config.vocab_size is not None and config.vocab_size != config.rows:
        notes.append(
            f"NeMo 2 has no field for the true vocabulary of {config.vocab_size}: on the way back the tokenizer says it"
        )
    rendered |= family.nemo2.write(config)
    rendered = {key: value for key, value in rendered.items() if key not in family.nemo2.without}
    return {"_target_": f"{family.nemo2.module}.{family.nemo2.model}", "config": rendered}


def _nemo2_window(reader: Reader, defaults: Mapping[str, Any]) -> tuple[int, int] | None:
    found = reader.pair("window_size") if "window_size" in reader.values else defaults.get("window_size")
    return None if found is None else (found[0], found[1])


def _check_nemo2_has(family: Spellings, config: ModelConfig) -> None:
    """What few families have must be in the family's classes."""
    known = set() if family.nemo2 is None else {entry.hub for entry in family.nemo2.fields} | family.nemo2.own
    for entry in OPTIONAL[1:]:
        value = getattr(config, entry.hub)
        if entry.hub not in known and value != entry.default:
            raise MappingError(
                f"NeMo 2's models of family {family.name} have no {entry.hub}",
                expected=entry.default,
                found=value,
                remedy=other_targets(family, config, "NeMo 2"),
            )
    if config.position_embedding_type not in _POSITIONS:
        raise MappingError(
            "NeMo 2 has no such position embedding",
            expected=f"one of {', '.join(_POSITIONS)}",
            found=config.position_embedding_type,
            remedy=other_targets(family, config, "NeMo 2"),
        )


def _function(reader: Reader, defaults: Mapping[str, Any]) -> str:
    value = reader.values.get("activation_func")
    target = value.get("_target_") if isinstance(value, Mapping) else value
    if target is None:
        target = defaults.get("activation_func")
    name = str(target).rpartition(".")[2]
    known = {path.rpartition(".")[2]: hub for hub, path in _FUNCTIONS.items()} | {"fast_gelu": "gelu_tanh"}
    if name not in known:
        raise MappingError(
            "NeMo 2's activation_func is unknown", expected=f"one of {', '.join(known)}", found=name[:80]
        )
    return known[name]


def _nemo2_dtype(reader: Reader) -> str | None:
    value = reader.values.get("params_dtype")
    target = value.get("_target_") if isinstance(value, Mapping) else value
    name = str(target).rpartition(".")[2] if target is not None else None
    return name if name in ("bfloat16", "float16", "float32") else None
