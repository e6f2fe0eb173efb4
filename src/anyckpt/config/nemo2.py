"""The configuration classes of NeMo 2.

Keys and defaults are fields of ``GPTConfig`` and its children in NeMo 2.5.  Functions and element types are spelled as
in ``model.yaml``: ``{_target_: torch.nn.functional.silu, _call_: false}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.block_keys import block_sizes, parse_blocks, parse_yarn, render_blocks, render_yarn
from anyckpt.config.eight_bit import EXTRA, from_nemo2
from anyckpt.config.fields import OPTIONAL, Field, render_fields
from anyckpt.config.model import ModelConfig, check, whole
from anyckpt.config.nemo_fields import SHARED, SIZES
from anyckpt.config.other_targets import lacking, other_targets
from anyckpt.config.reader import Reader
from anyckpt.config.rope_scaling import from_factors, to_factors
from anyckpt.config.spellings import NeMo2, Spellings
from anyckpt.errors import MappingError

_FIELDS = (
    *SIZES,
    *SHARED,
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
_POSITIONS = ("rope", "learned_absolute", "yarn", "mrope", "relative", "none")
FUNCTIONS = {
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


def nemo2_class(config: Mapping[str, Any]) -> str | None:
    """Name of the configuration class, without its module."""
    target = _inner(config).get("_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else None


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("config")
    return inner if isinstance(inner, Mapping) and "_target_" in inner else config


def parse(family: Spellings, config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration from ``model.yaml``, or from the configuration in it or in ``io.json``.

    Raises:
        MappingError: a field is missing, of the wrong type or of an unknown value.
    """
    reader = Reader(_inner(config), "NeMo 2 configuration")
    known = family.nemo2 or NeMo2("", "", ("LlamaConfig",))
    defaults = known.class_defaults(nemo2_class(config) or "")
    table = (*_FIELDS, *OPTIONAL[:1], *known.fields)
    own = {hub for row in known.codecs for hub in row.hubs}
    fields = reader.fields([entry for entry in table if entry.hub not in own], defaults)
    fields |= block_sizes(reader, defaults, fields)
    fields |= parse_blocks(reader, defaults, fields)
    yarn = parse_yarn(reader, defaults, fields)
    window = None if "window_size" in own else _window(reader, defaults)
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
                "dtype": _dtype(reader),
                "extra": {"features": reader.features(), EXTRA: from_nemo2(reader.values)},
                **reader.fields(known.codecs, defaults, known=fields),
            }
        )
    )


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """The model part of ``model.yaml`` without tokenizer: ``_target_`` and ``config``, for parallel sizes of 1.

    Raises:
        MappingError: NeMo 2 cannot express the configuration.
    """
    if family.nemo2 is None:
        raise lacking(family, config, "NeMo 2")
    yarn = render_yarn(family, config, "NeMo 2")
    factors, interpolation = to_factors(config.rope_scaling if yarn is None else None, "NeMo 2", fixed=False)
    _check_has(family, config)
    name = family.nemo2.chosen(config)
    dtype = config.dtype or "float32"
    rendered: dict[str, Any] = {
        "_target_": f"{family.nemo2.module}.{name}",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **render_fields((*_FIELDS, *family.nemo2.fields), config),
        "vocab_size": config.rows,
        "rotary_base": whole(config.rotary_base),
        "activation_func": {"_target_": FUNCTIONS[config.activation], "_call_": False},
        "seq_len_interpolation_factor": interpolation,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
        **render_blocks(config),
        **(yarn or {}),
        **config.extra.get(EXTRA, {}),
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
    rendered |= render_fields(family.nemo2.codecs, config)
    rendered = {key: value for key, value in rendered.items() if key not in family.nemo2.without}
    return {"_target_": f"{family.nemo2.module}.{family.nemo2.model}", "config": rendered}


def _window(reader: Reader, defaults: Mapping[str, Any]) -> tuple[int, int] | None:
    found = reader.pair("window_size") if "window_size" in reader.values else defaults.get("window_size")
    return None if found is None else (found[0], found[1])


def _check_has(family: Spellings, config: ModelConfig) -> None:
    """What few families have must be in the family's classes."""
    known = set() if family.nemo2 is None else family.nemo2.said
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
    known = {path.rpartition(".")[2]: hub for hub, path in FUNCTIONS.items()} | {"fast_gelu": "gelu_tanh"}
    if name not in known:
        raise MappingError(
            "NeMo 2's activation_func is unknown", expected=f"one of {', '.join(known)}", found=name[:80]
        )
    return known[name]


def _dtype(reader: Reader) -> str | None:
    value = reader.values.get("params_dtype")
    target = value.get("_target_") if isinstance(value, Mapping) else value
    name = str(target).rpartition(".")[2] if target is not None else None
    return name if name in ("bfloat16", "float16", "float32") else None
