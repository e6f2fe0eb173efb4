"""``model_config.yaml`` of NeMo 1.

Keys and defaults are those of ``MegatronGPTModel`` up to NeMo 2.0 (``megatron_llama_config.yaml``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config import nemo_speech
from anyckpt.config.block_keys import block_sizes, parse_blocks, render_blocks
from anyckpt.config.eight_bit import EXTRA, from_nemo1, to_nemo1
from anyckpt.config.encoder_keys import (
    SOFTMAX_SCALE,
    is_encoder_decoder,
    parse_encoders,
    render_encoders,
    sections,
    stack_sizes,
    with_encoder,
)
from anyckpt.config.fields import OPTIONAL, Field, render_changed, render_fields
from anyckpt.config.megatron import has_own_modules
from anyckpt.config.model import ModelConfig, check, whole
from anyckpt.config.nemo_fields import SHARED, SIZES
from anyckpt.config.other_targets import lacking
from anyckpt.config.reader import Reader
from anyckpt.config.rope_scaling import from_factors, to_factors
from anyckpt.config.spellings import Spellings
from anyckpt.errors import MappingError

_FIELDS = (
    *SHARED,
    Field("rotary_percent", "rotary_percentage", "number", 1.0),
    Field("add_bias_linear", "bias", "flag", True, ("add_bias_linear",)),
    Field("add_qkv_bias", "qkv_bias", "flag", False),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Token ids (and ``vocab_size``, the true one) are ours: NeMo 1 gets them from the tokenizer and ignores these."""
NEMO1_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that a decoder-only NeMo 1 checkpoint names."""
NORMS = {
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
    "rmsnorm": ("RMSNorm", False),
    "rmsnorm1p": ("RMSNorm", True),
}
ACTIVATIONS = {
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
_FILE = "model_config.yaml"
_PRECISIONS = {"bf16": "bfloat16", "16": "float16", "fp16": "float16", "32": "float32"}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide shapes, as far as the configuration says them (see ``of_ranks``).

    Raises:
        MappingError: a key is of the wrong type.
    """
    reader = Reader(unwrapped(config), _FILE)
    found = reader.fields(SIZES, {}, complete=False)
    found |= stack_sizes(reader, found)
    stated = reader.flag("gated_linear_unit")
    return {
        **found,
        "padded_vocab_size": reader.integer("override_vocab_size") or reader.integer("padded_vocab_size"),
        "gated_linear_unit": _activation(reader).endswith("glu") if stated is None else stated,
        **block_sizes(reader, _LATENT_DEFAULTS, found),
    }


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration from ``model_config.yaml`` or ``hparams.yaml``, of no family yet.

    Raises:
        MappingError: a key is missing, of the wrong type or of an unknown value.
    """
    reader = Reader(unwrapped(config), _FILE)
    fields = sizes(config)
    reader.require(SIZES, fields)
    fields |= reader.fields((*_FIELDS, *OPTIONAL), {})
    fields |= parse_encoders(reader, fields)
    fields |= parse_blocks(reader, {}, fields)
    spelled = (reader.text("normalization") or "layernorm").lower()
    activation = _activation(reader)
    for key, value, table in (("normalization", spelled, NORMS), ("activation", activation, ACTIVATIONS)):
        if value not in table:
            raise MappingError(
                f"model_config.yaml's {key} is unknown", expected=f"one of {', '.join(table)}", found=value
            )
    norm, zero_centered = NORMS[spelled]
    function, _ = ACTIVATIONS[activation]
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
            extra={"features": reader.features(), EXTRA: from_nemo1(reader.values)},
        )
    )


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``model_config.yaml`` without tokenizer, for tensor and pipeline parallel size 1.

    Raises:
        MappingError: NeMo 1 cannot express the configuration.
    """
    if family.nemo_speech is not None:
        return nemo_speech.render(family, config, notes)
    if not family.nemo1:
        raise lacking(family, config, "NeMo 1")
    factors, interpolation = to_factors(config.rope_scaling, "NeMo 1", fixed=True)
    if factors and factors["scale_factor"] != 8.0:
        notes.append(
            f"NeMo 1 scales rope by 8; the model needs {factors['scale_factor']:g}, which is written as scale_factor "
            "but releases before it know no such key"
        )
    norms = {value: key for key, value in NORMS.items()} | {("RMSNorm", True): "rmsnorm"}
    activations = {value: key for key, value in reversed(ACTIVATIONS.items())} | {("gelu_tanh", True): "geglu"}
    activation = activations.get((config.activation, config.gated_linear_unit))
    if activation is None:
        raise MappingError(
            "NeMo 1 has no such activation",
            expected=f"one of {', '.join(ACTIVATIONS)}",
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
            key: value for key, value in render_fields((*SIZES, *_FIELDS), config).items() if not _is_absent(key, value)
        },
        "rotary_base": whole(config.rotary_base),
        "vocab_size": config.vocab_size,
        "override_vocab_size": config.rows,
        "normalization": norms[config.normalization, config.layernorm_zero_centered_gamma],
        "activation": activation,
        **render_changed(OPTIONAL, config),
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
        **to_nemo1(config.extra.get(EXTRA, {})),
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
        rendered |= SOFTMAX_SCALE.write(config, notes)
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
