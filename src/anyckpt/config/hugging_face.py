"""Hugging Face's ``config.json``: read in its 4.x and 5.x spellings, written so that both load it.

4.x has ``rope_theta`` beside ``rope_scaling`` and ``torch_dtype``; 5.x has ``rope_parameters`` and ``dtype``
(transformers 5.23, ``modeling_rope_utils`` and ``configuration_utils``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anyckpt.config.decisive import check_decisive
from anyckpt.config.fields import Field
from anyckpt.config.model import PART_OF, WHOLE, ModelConfig, check, vocabulary_divisor
from anyckpt.config.own_part import is_part, own_part, with_text
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, Spellings
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import MappingError

COMMON = (
    Field("num_layers", "num_hidden_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "intermediate_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_query_groups", "num_key_value_heads", default=lambda found: found["num_attention_heads"]),
    Field(
        "kv_channels", "head_dim", default=lambda found: found["hidden_size"] // max(1, found["num_attention_heads"])
    ),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings", default=None),
    Field("init_method_std", "initializer_range", "number", 0.02),
    Field("attention_dropout", "attention_dropout", "number", 0.0),
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", False),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Keys that decoder-only families share."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
SPELLED = {hub: name for name, hub in reversed(ACTIVATIONS.items())}

_ATTENTION_BIAS = "attention_bias"
_HANDLED = {
    "architectures",
    "model_type",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "partial_rotary_factor",
    "dtype",
    "torch_dtype",
    _ATTENTION_BIAS,
}
WITHOUT_MEANING = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "pretraining_tp",
    "ep_size",
    "seq_aux",
    "auto_map",
    "_attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "attn_implementation",
    "torchscript",
    "max_window_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "cache_implementation",
    "classifier_dropout",
    "summary_type",
    "summary_use_proj",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "summary_activation",
    "task_specific_params",
    "is_decoder",
    "n_ctx",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "bias_dropout_fusion",
    "gradient_checkpointing",
    "tokenizer_class",
    "tokenizer_name",
    "init_device",
    "init_config",
    "embedding_fraction",
    "learned_pos_emb",
    "attn_config",
    "verbose",
}
"""Keys that say nothing about the model itself."""
_ABSENT = object()


def parse(family: Spellings, config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration from a ``config.json``.

    Raises:
        MappingError: a key is missing, of the wrong type, or says something that the family cannot be.
    """
    whole, config = config, own_part(family, config)
    reader = Reader(config, "config.json")
    known = family.hugging_face
    fields = reader.fields(known.fields, known.class_defaults)
    base, scaling, percent = _rope(reader, known) if is_rotary(family) else (10000.0, None, 1.0)
    keys = known.handled | _HANDLED | {known.activation_key or "", known.rotary_base_key, known.rotary_percent_key}
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise MappingError(
            "the model is quantized, and its packed weights are not those of its family",
            expected="no quantization_config in config.json",
            found=method or "one",
            remedy="convert the unquantized model, or convert the files with --to safetensors",
        )
    check_expected(family, config)
    check_decisive(family.name, config, known.handled | known.expected.keys() | known.carried)
    result = ModelConfig(
        **{
            **{name: value for name, value in family.traits.items() if name not in fields},
            "num_query_groups": fields.get("num_attention_heads"),
            "kv_channels": _head_width(fields),
            **fields,
            **_activation(family, reader),
            "family": family.name,
            "make_vocab_size_divisible_by": vocabulary_divisor(fields.get("vocab_size") or 1),
            "rotary_base": base,
            "rotary_percent": percent,
            "rope_scaling": scaling,
            "dtype": _dtype(config),
            **reader.fields(known.codecs, known.class_defaults, known={**fields, "rope_scaling": scaling}),
            "extra": {
                "hf": {key: value for key, value in config.items() if key not in keys},
                **({PART_OF: str(whole.get("model_type")), WHOLE: whole} if is_part(family, whole) else {}),
            },
        }
    )
    if known.attention_bias is not None:
        _check_biases(reader, result, known.attention_bias)
    return check(result)


def check_expected(family: Spellings, config: Mapping[str, Any]) -> None:
    """Nothing that is stated says that the model is another than the family can be.

    Raises:
        MappingError: something does.
    """
    for key, expected in family.hugging_face.expected.items():
        found = config.get(key)
        if found is not None and (type(found) is not type(expected) or found != expected):
            raise MappingError(
                f"config.json's {key} is not that of family {family.name}", expected=expected, found=repr(found)[:80]
            )


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``config.json`` that transformers 4.x and 5.x load.

    Raises:
        MappingError: transformers' class of the family cannot express the configuration.
    """
    known = family.hugging_face
    has_vocabulary = family.has_vocabulary
    if config.vocab_size is None and has_vocabulary:
        raise MappingError(
            "the vocabulary size is unknown",
            expected="vocab_size in the configuration",
            remedy="give it with --config, or give the tokenizer with --tokenizer",
        )
    keys = {entry.key for entry in known.fields}
    _check_heads(family, config)
    rendered: dict[str, Any] = {
        **({"use_cache": True} if has_vocabulary else {}),
        **config.extra.get("hf", {}),
        **known.constants,
        **_render_fields(known.fields, config),
        "architectures": [known.architectures[0]],
        "model_type": known.model_types[0],
    }
    if known.activation_key is not None:
        rendered[known.activation_key] = known.activations.get(config.activation, SPELLED[config.activation])
    if config.position_embedding_type == "rope" and is_rotary(family):
        rendered |= _render_rope(family, config)
    if config.dtype is not None:
        rendered["dtype"] = rendered["torch_dtype"] = config.dtype
    if known.attention_bias is not None and ("mlp_bias" in keys or config.add_bias_linear):
        rendered[_ATTENTION_BIAS] = config.add_bias_linear or config.add_qkv_bias
    _check_window(family, config)
    for row in known.codecs:
        rendered |= row.write(config, notes)
    if config.eos_token_id is None and "eos_token_id" in keys and "hf" not in config.extra:
        notes.append("which token ends a text is not recorded: set eos_token_id in config.json before generating")
    if config.hidden_dropout and "hidden_dropout" not in known.said:
        notes.append(f"hidden_dropout {config.hidden_dropout} has no place in a {known.model_types[0]} config.json")
    return rendered


def render_whole(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """The ``config.json`` of the larger model whose text part a model is, as it was but for what is of this model.

    What the model does not say, such as a token, is as it was, too.

    Raises:
        MappingError: transformers' class of the family cannot express the configuration.
    """
    whole: Mapping[str, Any] = config.extra[WHOLE]
    before, after = render(family, parse(family, whole), []), render(family, config, notes)
    changed = {key: value for key, value in after.items() if before.get(key, _ABSENT) != value}
    return with_text(whole, {key: value for key, value in changed.items() if value is not None or key not in before})


def is_rotary(family: Spellings) -> bool:
    """Whether models of the family have rotary embeddings, or may have."""
    return bool(family.traits.get("position_embedding_type", "rope") == "rope")


def _render_rope(family: Spellings, config: ModelConfig) -> dict[str, Any]:
    """Both spellings."""
    known = family.hugging_face
    rope = {"rope_theta": config.rotary_base, **(config.rope_scaling or {"rope_type": "default"})}
    rendered: dict[str, Any] = {
        known.rotary_base_key: config.rotary_base,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
    }
    if not config.rope_scaling and known.rope_scaling is not None:  # null would be that
        rendered["rope_scaling"] = {"rope_type": "default"}
    if config.rotary_percent != 1.0 or known.rotary_percent != 1.0:
        rendered[known.rotary_percent_key] = rope["partial_rotary_factor"] = config.rotary_percent
    return {**rendered, "rope_parameters": rope}


def _activation(family: Spellings, reader: Reader) -> dict[str, str]:
    """The hub's field, if the configuration has a key for it."""
    known = family.hugging_face
    if known.activation_key is None:
        return {}
    spelled = reader.text(known.activation_key) or known.class_defaults.get(known.activation_key)
    meant = family.traits.get("activation", "silu")
    if spelled is not None:
        meant = known.misspelled.get(spelled, ACTIVATIONS.get(spelled, spelled))
    _expect(family, "activation", known.activation_key, meant)
    if meant not in SPELLED:
        raise MappingError(
            f"config.json's {known.activation_key} is unknown",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            found=meant[:80],
        )
    return {"activation": meant}


def _head_width(fields: Mapping[str, Any]) -> int | None:
    """Of a class that has no key for it."""
    return fields["hidden_size"] // max(1, fields["num_attention_heads"]) if "num_attention_heads" in fields else None


def _check_heads(family: Spellings, config: ModelConfig) -> None:
    """A class that has no key for a head's width or for key heads derives them."""
    known = family.hugging_face
    said = known.said
    derived = {
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "num_query_groups": config.num_attention_heads,
    }
    for name, value in derived.items():
        if "num_attention_heads" in said and name not in said and getattr(config, name) != value:
            raise MappingError(
                f"transformers' {known.architectures[0]} has no key for {name}",
                expected=value,
                found=getattr(config, name),
                remedy="choose the family with --family",
            )


def _render_fields(table: Iterable[Field], config: ModelConfig) -> dict[str, Any]:
    """Null is a value for token ids; for most other keys it would replace the class's default by nothing."""
    return {
        key: value
        for row in table
        for key, value in row.write(config, []).items()
        if value is not None or row.null or key.endswith("_token_id")
    }


def surplus(config: ModelConfig) -> list[str]:
    """Keys of the source's ``config.json`` that may mean something and that no other framework's spelling has."""
    return sorted(
        key
        for key, value in config.extra.get("hf", {}).items()
        if key not in WITHOUT_MEANING and value not in (None, False, [], {})
    )


def _rope(reader: Reader, known: HuggingFace) -> tuple[float, dict[str, Any] | None, float]:
    """Base, scaling and rotated fraction of a head, from either spelling; 5.x's is the stronger one.

    Sections of channels for positions in pictures (``mrope``) make no difference to text.
    """
    stated = reader.mapping("rope_parameters")
    if "rotary_base_local" in known.said:  # theta of windowed layers, which they read
        stated = Reader(stated, "config.json's rope_parameters").mapping("full_attention")
    parameters = Reader(stated, "config.json's rope_parameters")
    old = reader.mapping("rope_scaling")
    base = parameters.number("rope_theta") or reader.number(known.rotary_base_key) or known.rotary_base
    percent = parameters.number("partial_rotary_factor") or reader.number(known.rotary_percent_key)
    scaling = dict(parameters.values) if parameters.values else dict(old)
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if not isinstance(kind, str):
        raise MappingError("config.json's rope type is not text", found=repr(kind)[:80])
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise MappingError(
            "config.json has rope parameters per kind of layer, which this family does not have",
            found=", ".join(map(str, scaling)),
        )
    result = None if kind in ("default", "mrope") else {"rope_type": kind, **scaling}
    if not reader.values.keys() & {"rope_parameters", "rope_scaling"} and known.rope_scaling is not None:
        result = dict(known.rope_scaling)
    return base, result, percent or known.rotary_percent


def _check_window(family: Spellings, config: ModelConfig) -> None:
    known = family.hugging_face
    said = known.said
    if config.window_size is None or "window_attn_skip_freq" in said:
        return
    if "window_size" not in said:
        raise MappingError(
            f"transformers' {known.architectures[0]} has no such attention window",
            expected="none",
            found=config.window_size,
            remedy="choose the family with --family",
        )
    if config.window_attn_skip_freq is not None:
        raise MappingError(
            f"transformers' {known.architectures[0]} has the window in every layer",
            expected="no window_attn_skip_freq",
            found=config.window_attn_skip_freq,
            remedy="choose the family with --family",
        )


def _dtype(config: Mapping[str, Any]) -> str | None:
    name = config.get("dtype") or config.get("torch_dtype")
    plain = name.removeprefix("torch.") if isinstance(name, str) else None
    return plain if plain in BY_NAME else None


def _check_biases(reader: Reader, config: ModelConfig, default: bool) -> None:
    """transformers can give biases to all attention projections alone; Megatron only to all layers or to q, k, v."""
    stated = reader.flag(_ATTENTION_BIAS)
    attention = default if stated is None else stated
    if attention != config.add_bias_linear and not config.add_qkv_bias:
        raise MappingError(
            "has biases that Megatron-Core has no layers for",
            expected="attention_bias and mlp_bias to be equal",
            found=f"attention_bias {attention}, mlp_bias {config.add_bias_linear}",
        )


def _expect(family: Spellings, hub: str, key: str, found: Any) -> None:
    expected = family.traits.get(hub, found)
    if found != expected:
        raise MappingError(f"config.json's {key} is not that of family {family.name}", expected=expected, found=found)
