"""What a model is: the metadata of a GGUF file, from and into Hugging Face's configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anyckpt.errors import FormatError, MappingError
from anyckpt.formats.gguf.architectures import Architecture
from anyckpt.indexing import Array

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.freq_base": "rope_theta",
}
"""Key after the architecture's name -> the hub's."""
_FLOATS = {"rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta"}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
WITH_WINDOW = ("gemma2", "gemma3", "gpt-oss")
"""Architectures of which llama.cpp reads the window; others ignore it."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose queries are scaled by another number."""
_LLAMA3 = tuple(
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0)
)
_LOCAL_BASE = 10_000.0


def to_config(
    metadata: Mapping[str, Any], known: Architecture, shapes: Mapping[str, tuple[int, ...]], path: str
) -> dict[str, Any]:
    """The hub's configuration of a file.

    Args:
        metadata: of the file.
        known: its architecture.
        shapes: of its tensors by stored name.
        path: of the file.

    Raises:
        FormatError: a number is missing or is none.
        MappingError: layers differ in what the hub's configuration says once.
    """
    config: dict[str, Any] = {"architectures": [known.model_class], "model_type": known.model_type, **known.fixed}
    for key, own in _KEYS.items():
        value = metadata.get(f"{known.name}.{key}")
        if value is None:
            continue
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise MappingError(
                f"its layers differ in {key}", path=path, expected="one value for all layers", found=value[:8]
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{known.name}.{key} is no number", path=path, found=value)
        if own not in _FLOATS and (not isinstance(value, int) or value < 0):
            raise FormatError(f"{known.name}.{key} is no count", path=path, found=value)
        config[own] = short(value) if own in _FLOATS else value
    if known.pairs_of_experts:
        config.pop("moe_intermediate_size", None)
    missing = [own for own in _NEEDED if own not in config]
    if missing:
        keys = ", ".join(f"{known.name}.{key}" for key, own in _KEYS.items() if own in missing)
        raise FormatError(f"its metadata lacks {keys}", path=path, remedy="convert the model again")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if "head_dim" not in config:
        heads = max(1, config["num_attention_heads"])
        config["head_dim"] = metadata.get(f"{known.name}.rope.dimension_count") or config["hidden_size"] // heads
    if known.expert_count:
        config[known.expert_count] = metadata[f"{known.name}.expert_count"]
    if "token_embd.weight" in shapes:
        config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if known.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if known.name in _LARGEST:
        config["query_pre_attn_scalar"] = scalar_of(known.name, config)
    if known.name == "gemma3":
        local = metadata.get("gemma3.rope.freq_base_swa")
        config["rope_local_base_freq"] = _LOCAL_BASE if local is None else short(local)
    scaling = _scaling(metadata, known.name)
    if scaling is not None:
        config["rope_scaling"] = scaling
    elif known.pairs_of_experts:  # transformers' class takes yarn where nothing is said
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", _LOCAL_BASE)}
    for key, own in _TOKENS.items():
        value = metadata.get(f"tokenizer.ggml.{key}")
        if type(value) is int:
            config[own] = value
    return config


def short(value: float) -> float:
    """The shortest decimal number that is stored so in float32: 1e-05, which would else be 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(metadata: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    kind = metadata.get(f"{name}.rope.scaling.type")
    factor = metadata.get(f"{name}.rope.scaling.factor")
    if kind in (None, "none") or not isinstance(factor, (int, float)):
        return None
    found: dict[str, Any] = {"rope_type": kind, "factor": short(float(factor))}
    if name == "gpt-oss" and kind == "yarn":
        found |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}  # as llama.cpp takes them
    original = metadata.get(f"{name}.rope.scaling.original_context_length")
    return found if original is None else {**found, "original_max_position_embeddings": original}


def scalar_of(name: str, config: Mapping[str, Any]) -> int:
    """What llama.cpp takes for ``query_pre_attn_scalar``, which the file does not say: by the number of layers."""
    whole = config["num_hidden_layers"] == _LARGEST[name]
    return int(config["hidden_size"] // config["num_attention_heads"] if whole else config["head_dim"])


def llama3_scaling(divisors: Array, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``rope_scaling`` by which a file's divisors of frequencies are made; None if it is none that models have."""
    for values in _LLAMA3:
        made = divisors_of({**values}, float(config.get("rope_theta", _LOCAL_BASE)), int(config["head_dim"]))
        if made.shape == divisors.shape and np.allclose(made, divisors, rtol=1e-5):
            return {"rope_type": "llama3", **values}
    return None


def divisors_of(scaling: Mapping[str, Any], base: float, size: int) -> Array:
    """Divisors of a head's frequencies by ``rope_type`` llama3, float32 ``[size // 2]``."""
    frequencies = np.float32(1) / np.float32(base) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    lengths = 2 * math.pi / frequencies.astype(np.float64)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, between))
    return found.astype(np.float32)


def rope_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary settings of all layers, and of those with a window where they have others.

    transformers 5 says them as ``rope_parameters``, by kind of layer perhaps; 4 in several keys.
    """
    stated = config.get("rope_parameters")
    if isinstance(stated, Mapping):
        whole = stated.get("full_attention", stated)
        return dict(whole), dict(stated.get("sliding_attention", {}))
    scaling = config.get("rope_scaling")
    whole = {"rope_theta": config.get("rope_theta"), **(scaling if isinstance(scaling, Mapping) else {})}
    whole.setdefault("rope_type", whole.get("type", "default"))
    return whole, {"rope_theta": config.get("rope_local_base_freq")}


def to_metadata(config: Mapping[str, Any], known: Architecture, path: str) -> Iterator[tuple[str, Any]]:
    """The keys of an architecture, in the order of llama.cpp's converter.

    Raises:
        MappingError: the model has something that llama.cpp takes to be otherwise.
    """
    check_possible(config, known, path)
    rope, local = rope_of(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    values = {
        **config,
        "rope_theta": rope.get("rope_theta"),
        "head_dim": size,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    if known.name not in WITH_WINDOW:
        values.pop("sliding_window", None)
    for key, own in _KEYS.items():
        value = values.get(own)
        if value is not None and not isinstance(value, (bool, str, list, dict)):
            yield f"{known.name}.{key}", float(value) if own in _FLOATS else int(value)
    yield f"{known.name}.attention.value_length", size
    yield f"{known.name}.rope.dimension_count", size
    if known.pairs_of_experts:
        yield f"{known.name}.expert_feed_forward_length", int(config["intermediate_size"])
    if known.expert_count:
        yield f"{known.name}.expert_count", experts_of(config, known, path)
    if known.name == "gemma3" and local.get("rope_theta"):
        yield "gemma3.rope.freq_base_swa", float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        yield f"{known.name}.rope.scaling.type", kind
        yield f"{known.name}.rope.scaling.factor", float(rope["factor"])
        if kind == "yarn" and rope.get("original_max_position_embeddings"):
            yield f"{known.name}.rope.scaling.original_context_length", int(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise MappingError(
            f"how to write rope_type {kind} is not known", path=path, expected="default, linear, yarn or llama3"
        )
    yield f"{known.name}.vocab_size", int(config["vocab_size"])


def experts_of(config: Mapping[str, Any], known: Architecture, path: str) -> int:
    """The number of experts, which transformers 5 calls ``num_local_experts`` in more models than 4 did.

    Raises:
        MappingError: the configuration does not say it.
    """
    for key in (known.expert_count, "num_local_experts"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise MappingError(f"the configuration lacks {known.expert_count}", path=path)


def check_possible(config: Mapping[str, Any], known: Architecture, path: str) -> None:
    """Raise where llama.cpp would run another model than the configuration says.

    Raises:
        MappingError: with the key.
    """
    missing = [key for key in (*_NEEDED, "vocab_size") if not isinstance(config.get(key), int)]
    if missing:
        raise MappingError(f"the configuration lacks {', '.join(missing)}", path=path)
    wanted = dict(known.fixed)
    if known.name in _LARGEST:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        wanted["query_pre_attn_scalar"] = scalar_of(known.name, {**config, "head_dim": size})
    types = config.get("layer_types")
    every = known.window_every
    if isinstance(types, list) and every and len(types) == config["num_hidden_layers"]:
        wanted["layer_types"] = [
            "sliding_attention" if (number + 1) % every else "full_attention" for number in range(len(types))
        ]
    for key, value in wanted.items():
        stated = config.get(key, value)
        if stated != value and not (stated is None and not value):
            raise MappingError(
                f"llama.cpp's {known.name} does not take {key} from the file",
                path=path,
                expected=f"{key} {value}",
                found=stated,
                remedy="convert to another format",
            )
