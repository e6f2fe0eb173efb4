"""``config.json`` of TensorRT-LLM's checkpoints, as NVIDIA ModelOpt 0.40 and TensorRT-LLM 0.17 write it.

What is left out means what ``PretrainedConfig`` of TensorRT-LLM takes.  How the weights are quantized and divided over
ranks is said in the same file, and is the format's matter: ``quantization``, ``mapping`` and ``rank`` are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config import hugging_face
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import Spellings, TrtLlm
from anyckpt.errors import MappingError

_WHAT = "config.json of TensorRT-LLM"
_NEEDED = {"architecture", "hidden_size", "num_hidden_layers", "num_attention_heads"}
_ACTIVATIONS = {
    "swiglu": "silu",
    "fast-swiglu": "silu",
    "geglu": "gelu",
    "gegelu": "gelu",
    "squared-relu": "relu2",
    "squared_relu": "relu2",
}
"""TensorRT-LLM's name -> transformers'; the others are the same."""
_POSITIONS = {"rope_gpt_neox": "rope", "learned_absolute": "learned_absolute"}
_OF_EXPERTS = "moe_intermediate_size"
"""The width of experts, of classes that have one beside ``intermediate_size``."""
_HALF_PRECISION = ("float16", "bfloat16")


def is_trtllm(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has TensorRT-LLM's keys; transformers' has ``architectures``."""
    return config.keys() >= _NEEDED and "architectures" not in config


def is_of(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a family's models."""
    known = family.trtllm
    return known is not None and config.get("architecture") in known.architectures and known.fits(config)


def class_of(family: Spellings) -> TrtLlm:
    """How TensorRT-LLM knows a family.

    Raises:
        MappingError: that is not known.
    """
    if family.trtllm is None:
        raise MappingError(
            f"how TensorRT-LLM names models of family {family.name} is not known",
            remedy="convert to hf, which TensorRT-LLM's own converters read",
        )
    return family.trtllm


def parse(family: Spellings, config: Mapping[str, Any], notes: list[str]) -> ModelConfig:
    """The hub's configuration: what the file says, put as transformers' class of the family takes it.

    Args:
        family: of which the model is.
        config: the file.
        notes: what had to be concluded is appended.

    Raises:
        MappingError: a key is missing, of the wrong type, or says something that the family cannot be.
    """
    known = family.hugging_face
    stated = _stated(Reader(config, _WHAT))
    said = {entry.key: stated[entry.hub] for entry in known.fields if stated.get(entry.hub) is not None}
    said["model_type"] = known.model_types[0]
    if known.activation_key is not None:
        name = stated["activation"]
        said[known.activation_key] = _ACTIVATIONS.get(name, name)
    if hugging_face.is_rotary(family):
        said[known.rotary_base_key] = stated["rotary_base"]
        said["rope_scaling"] = stated["rope_scaling"]
        if stated["rotary_percent"] != 1.0 or known.rotary_percent != 1.0:
            said[known.rotary_percent_key] = stated["rotary_percent"]
    if known.attention_bias is not None and stated["add_bias_linear"]:
        said["attention_bias"] = True
    said |= {} if family.trtllm is None else family.trtllm.told(config)
    model = hugging_face.parse(family, said)
    notes.append(
        "TensorRT-LLM's config.json does not say which tokens begin and end a text"
        + ("" if model.window_size is None else f", nor how far attention sees ({model.window_size[0] + 1} is taken)")
        + ": what transformers' class takes is written; give the model's config.json with --config for its own"
    )
    extra = {key: value for key, value in model.extra.items() if key != "hf"}
    return replace(model, dtype=stated["dtype"], extra=extra)


def _stated(reader: Reader) -> dict[str, Any]:
    """Hub fields, with TensorRT-LLM's own defaults."""
    sizes = {}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        sizes[key] = reader.integer(key)
        if sizes[key] is None:
            raise MappingError(f"the {_WHAT} has no {key}", remedy="copy it again from the checkpoint's origin")
    hidden, heads = sizes["hidden_size"] or 0, sizes["num_attention_heads"] or 0
    experts = Reader({**_older_moe(reader.values), **reader.mapping("moe")}, f"moe of the {_WHAT}")
    count = experts.integer("num_experts")
    return {
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": reader.integer("num_key_value_heads") or heads,
        "kv_channels": reader.integer("head_size") or hidden // max(1, heads),
        "ffn_hidden_size": reader.integer("intermediate_size") or 4 * hidden,
        "vocab_size": reader.integer("vocab_size"),
        "layernorm_epsilon": _or(reader.number("norm_epsilon"), 1e-5),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "share_embeddings_and_output_weights": bool(reader.flag("share_embedding_table")),
        "add_bias_linear": bool(reader.flag("bias")),
        "rotary_base": _or(reader.number("rotary_base"), 10000.0),
        "rotary_percent": _or(reader.number("rotary_pct"), 1.0),
        "rope_scaling": dict(reader.mapping("rotary_scaling")) or None,
        "query_pre_attn_scalar": reader.number("query_pre_attn_scalar"),
        "attn_logit_softcapping": reader.number("attn_logit_softcapping"),
        "final_logit_softcapping": reader.number("final_logit_softcapping"),
        "moe_ffn_hidden_size": reader.integer(_OF_EXPERTS) or None,
        "moe_shared_expert_intermediate_size": reader.integer("moe_shared_expert_intermediate_size") or None,
        "num_moe_experts": count or None,
        "moe_router_topk": experts.integer("top_k") if count else None,
        "activation": reader.text("hidden_act") or "gelu",
        "dtype": reader.text("dtype"),
    }


def _older_moe(values: Mapping[str, Any]) -> dict[str, Any]:
    """``moe`` of files that say it key by key, as NeMo's converter does."""
    return {key: values[f"moe_{key}"] for key in ("num_experts", "top_k") if f"moe_{key}" in values}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``config.json`` in ModelOpt's order, without what the format adds.

    Raises:
        MappingError: the family has no place in TensorRT-LLM that we know, or the model none in its class.
    """
    known = class_of(family)
    position = next((name for name, hub in _POSITIONS.items() if hub == config.position_embedding_type), None)
    if position is None or config.rotary_interleaved:
        raise MappingError(
            "the position embedding has no place here",
            expected=" or ".join(_POSITIONS.values()),
            found=config.position_embedding_type,
        )
    if config.vocab_size is None:
        raise MappingError("the vocabulary size is unknown", remedy="give it with --vocab-size")
    if config.window_size is not None and not known.windows:
        notes.append(
            f"attention sees {config.window_size[0] + 1} tokens back, for which the file has no key: set "
            "max_attention_window_size when the engine runs"
        )
    dense = [layer for layer in range(config.num_layers) if config.num_moe_experts and not config.is_sparse(layer)]
    if dense:
        raise MappingError(
            "some layers have no experts, and in TensorRT-LLM's class all have",
            expected="experts in every layer",
            found=f"none in {len(dense)} of {config.num_layers}, layer {dense[0]} among them",
            remedy="convert to hf, and serve that with TensorRT-LLM's PyTorch backend or with vLLM",
        )
    rotary, keys = config.position_embedding_type == "rope", known.keys(config)
    rendered: dict[str, Any] = {
        "architecture": known.architectures[0],
        "dtype": config.dtype,
        "logits_dtype": "float16" if config.dtype in _HALF_PRECISION else "float32",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "hidden_size": config.hidden_size,
        "norm_epsilon": config.layernorm_epsilon,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": known.activation or hugging_face.SPELLED[config.activation],
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": config.kv_channels,
        "intermediate_size": config.ffn_hidden_size
        if _OF_EXPERTS in keys or not config.num_moe_experts
        else config.moe_ffn_hidden_size,
        "position_embedding_type": position,
        "share_embedding_table": config.share_embeddings_and_output_weights and known.shares_embedding,
        "residual_mlp": False,
        "bias": config.add_bias_linear,
        "rotary_pct": float(config.rotary_percent),
        "decoder": known.decoder,
        "rmsnorm": config.normalization == "RMSNorm",
        "lm_head_bias": False,
        **({"rotary_base": float(config.rotary_base)} if rotary else {}),
        **({"rotary_scaling": dict(config.rope_scaling)} if rotary and config.rope_scaling else {}),
        **keys,
    }
    if config.num_moe_experts:
        rendered["moe"] = {
            "num_experts": config.num_moe_experts,
            "top_k": config.moe_router_topk,
            "normalization_mode": int(known.normalises or not config.moe_router_pre_softmax),
        }
    return rendered
