"""``run_config.yaml``: the model's provider in Megatron-LM's words, and arguments as a provider.

The section ``model`` lists every field of a dataclass with ``_target_``, its class; a function or element type is
``{_target_: torch.nn.functional.silu, _call_: false}``.  Most fields are called as Megatron-LM's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.megatron_bridge_providers import (
    HETEROGENEOUS,
    LLAMA31,
    arguments_of_fields,
    own_fields,
    provider_of,
)
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError

_BESIDE = "anyckpt"
"""A section of ``run_config.yaml`` that is ours; Megatron-Bridge reads those that it knows by name."""

_NEEDLESS = ("use_mcore_models", "rope_scaling_factor")
"""Arguments that every such model has, or that mean something only beside another that is said."""

CONTAINER = "megatron.bridge.training.config.ConfigContainer"
_CHECKPOINT = "megatron.bridge.training.config.CheckpointConfig"
_FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "squared_relu": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    "fast_gelu": "megatron.core.activations.fast_gelu",
}
_SAME = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
    layernorm_epsilon add_bias_linear add_qkv_bias qk_layernorm init_method_std attention_dropout hidden_dropout
    position_embedding_type rotary_base rotary_percent rotary_interleaved make_vocab_size_divisible_by window_size
    seq_length num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    """.split()
)
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
)
_LATENT = {"q_lora_rank": 512, "kv_lora_rank": 512}
"""What ``MLATransformerConfig`` takes where it is told nothing, and Megatron-LM's arguments do not."""
_LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""Megatron-Core's constants, which a provider can change and arguments cannot."""


def arguments_of(run_config: Mapping[str, Any], path: str, warnings: list[str]) -> dict[str, Any]:
    """The model in the words of Megatron-LM's arguments.

    Args:
        run_config: the whole file.
        path: its path, for messages.
        warnings: what arguments cannot say is appended here.

    Raises:
        FormatError: there is no section ``model``.
    """
    model = run_config.get("model")
    if not isinstance(model, Mapping):
        raise FormatError("has no section 'model'", path=path, found=", ".join(map(str, list(run_config)[:5])))
    inner = model.get("transformer")  # configurations that a builder makes keep the layers' part apart
    fields = {**(inner if isinstance(inner, Mapping) else {}), **model}
    arguments: dict[str, Any] = {
        str(key): value for key, value in fields.items() if isinstance(value, (bool, int, float, str))
    }
    for key in ("_target_", "share_embeddings_and_output_weights", "should_pad_vocab", "vocab_size", "scale_factor"):
        arguments.pop(key, None)
    name, gated = _function(fields.get("activation_func")), bool(fields.get("gated_linear_unit"))
    tied = fields.get("share_embeddings_and_output_weights")
    arguments.update(
        untie_embeddings_and_output_weights=tied is not None and not tied,
        swiglu=gated and name == "silu",
        squared_relu=name == "squared_relu",
        quick_geglu=gated and name == "quick_gelu",
        openai_gelu=name in ("fast_gelu", "openai_gelu"),
        group_query_attention=fields.get("num_query_groups") not in (None, fields.get("num_attention_heads")),
        norm_epsilon=fields.get("layernorm_epsilon"),
        apply_layernorm_1p=bool(fields.get("layernorm_zero_centered_gamma")),
        max_position_embeddings=fields.get("max_position_embeddings", fields.get("seq_length")),
        num_experts=fields.get("num_moe_experts"),
        rotary_seq_len_interpolation_factor=fields.get("seq_len_interpolation_factor"),
        window_size=fields.get("window_size"),
        pipeline_model_parallel_layout=fields.get("pipeline_model_parallel_layout"),
        params_dtype=_dtype(fields),
        **_vocabulary(fields),
        **_rope(fields, warnings),
    )
    if fields.get("multi_latent_attention"):
        arguments = {**{key: value for key, value in _LATENT.items() if key not in fields}, **arguments}
    arguments.update(arguments_of_fields(fields))
    beside = run_config.get(_BESIDE)
    return {**arguments, **beside} if isinstance(beside, Mapping) else arguments


def _function(value: Any) -> str:
    target = value.get("_target_") if isinstance(value, Mapping) else value
    return str(target).rpartition(".")[2] if target is not None else ""


def _dtype(fields: Mapping[str, Any]) -> str | None:
    name = _function(fields.get("params_dtype"))
    return f"torch.{name}" if name in ("bfloat16", "float16", "float32") else None


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``should_pad_vocab`` says whether rows are added to ``vocab_size``."""
    size, multiple = fields.get("vocab_size"), fields.get("make_vocab_size_divisible_by", 128)
    if type(size) is not int or not 0 < size < 1 << 40:
        return {}
    padded = size
    ranks = fields.get("tensor_model_parallel_size", 1)
    if fields.get("should_pad_vocab") and type(multiple) is int and type(ranks) is int and multiple > 0 < ranks:
        padded = -(-size // (multiple * ranks)) * multiple * ranks
    return {"vocab_size": size, "padded_vocab_size": padded}


def _rope(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Llama 3.1's scaling: a field of that provider, or a switch of the general one."""
    factor = fields.get("scale_factor", fields.get("rope_scaling_factor", 8.0) if fields.get("rope_scaling") else None)
    if factor is None:
        return {"use_rope_scaling": False}
    for key, value in _LLAMA31.items():
        if fields.get(key, value) != value:
            warnings.append(f"run_config.yaml's {key} is {fields[key]}; Megatron-LM's arguments always mean {value}")
    return {"use_rope_scaling": True, "rope_scaling_factor": factor}


@dataclass(frozen=True)
class Facts:
    """What is in a checkpoint.

    Attributes:
        dtype: of the weights, in torch's name, or None if unknown.
        has_optimizer: optimizer state is in it.
        has_rng: random states are.
    """

    dtype: str | None
    has_optimizer: bool
    has_rng: bool


def run_config_of(
    arguments: Mapping[str, Any], rows: int | None, facts: Facts, release: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A ``run_config.yaml`` with what Megatron-Bridge needs to build the model and to load the checkpoint.

    Args:
        arguments: the model in Megatron-LM's words.
        rows: of the stored vocabulary.
        facts: what is in the checkpoint.
        release: of Megatron-Core that will load it; None for the newest.

    Raises:
        MappingError: Megatron-Bridge has no such models.
    """
    provider = provider_of(arguments, release)
    gated = any(arguments.get(key) for key in ("swiglu", "quick_geglu", "gated_linear_unit"))
    model: dict[str, Any] = {
        "_target_": provider,
        **{key: arguments[key] for key in _SAME if arguments.get(key) is not None},
        "layernorm_epsilon": arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)),
        "layernorm_zero_centered_gamma": bool(arguments.get("apply_layernorm_1p")),
        "gated_linear_unit": gated,
        "activation_func": {"_target_": _FUNCTIONS[_activation(arguments)], "_call_": False},
        "share_embeddings_and_output_weights": not arguments.get("untie_embeddings_and_output_weights"),
        "num_moe_experts": arguments.get("num_experts"),
        "seq_len_interpolation_factor": arguments.get("rotary_seq_len_interpolation_factor"),
        "transformer_impl": arguments.get("transformer_impl") or "transformer_engine",
        **{key: arguments.get(key) for key in _SIZES},
        **_written_vocabulary(arguments, rows),
        **own_fields(arguments, provider),
    }
    model.update((key, 1) for key in _SIZES if model[key] is None and not key.startswith("virtual"))
    if "seq_length" not in model and arguments.get("max_position_embeddings") is not None:
        model["seq_length"] = arguments["max_position_embeddings"]
    if arguments.get("use_rope_scaling"):
        model.update(_scaled(arguments, provider))
    config = {
        "_target_": CONTAINER,
        "checkpoint": {"_target_": _CHECKPOINT, "ckpt_format": "torch_dist", "fully_parallel_save": True},
        "model": model,
    }
    whole = described(config, facts)
    return {**whole, **_beside(whole, arguments)}


def _scaled(arguments: Mapping[str, Any], provider: str) -> dict[str, Any]:
    """Llama 3's scaling of rope: a switch since Megatron-Bridge 0.3, which drops the older fields of one class."""
    factor = float(arguments.get("rope_scaling_factor") or 8.0)
    constants = {"scale_factor": factor, **_LLAMA31} if provider in (LLAMA31, HETEROGENEOUS) else {}
    return {**constants, "rope_scaling": True, "rope_scaling_factor": factor}


def _beside(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of our own arguments no field says, under a key that Megatron-Bridge does not look at."""
    if "hf_model_type" not in arguments:
        return {}  # Megatron-LM's own: most are not about the model
    said = arguments_of(config, "", [])
    rest = {
        key: value
        for key, value in arguments.items()
        if said.get(key) != value and (value or said.get(key)) and key not in _NEEDLESS
    }
    return {_BESIDE: rest} if rest else {}


def described(run_config: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The configuration with what is in the checkpoint: a load asks for what it says was saved."""
    model = dict(run_config.get("model") or {})
    if facts.dtype is not None:
        torch_type = {"_target_": f"torch.{facts.dtype}", "_call_": False}
        model.update(bf16=facts.dtype == "bfloat16", fp16=facts.dtype == "float16", params_dtype=torch_type)
    saved = run_config.get("checkpoint")
    checkpoint = {
        **(saved if isinstance(saved, Mapping) else {}),
        "save_optim": facts.has_optimizer,
        "save_rng": facts.has_rng,
    }
    checkpoint.setdefault("fully_parallel_save", True)
    return {**run_config, "checkpoint": checkpoint, "model": model}


def _activation(arguments: Mapping[str, Any]) -> str:
    if arguments.get("swiglu"):
        return "silu"
    if arguments.get("squared_relu"):
        return "squared_relu"
    if arguments.get("quick_geglu"):
        return "quick_gelu"
    if arguments.get("openai_gelu"):
        return "fast_gelu"
    return str(arguments["activation"]) if arguments.get("activation") in _FUNCTIONS else "gelu"


def _written_vocabulary(arguments: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """The true size with padding if the provider's rule gives the rows that are stored, else these as they are."""
    true, multiple = arguments.get("vocab_size"), arguments.get("make_vocab_size_divisible_by")
    if rows is None:
        return {"vocab_size": true, "should_pad_vocab": False}
    if type(true) is int and type(multiple) is int and multiple > 0:
        ranks = arguments.get("tensor_model_parallel_size")
        step = multiple * (ranks if type(ranks) is int and ranks > 0 else 1)
        if -(-true // step) * step == rows:
            return {"vocab_size": true, "should_pad_vocab": rows != true}
    return {"vocab_size": rows, "should_pad_vocab": False}
