"""What a run of GPT-NeoX says of its model, and transformers' configuration of it.

Keys have hyphens or underscores.  What is left out is as ``NeoXArgs`` has it, and what is made of it as
``tools/ckpts/convert_neox_to_hf.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.errors import FormatError
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.source import ByteSource

_LIMIT = 1 << 20
_ALONE = {
    "pos_emb": "rotary",
    "norm": "layernorm",
    "activation": "gelu",
    "gpt_j_tied": False,
    "use_qk_layernorm": False,
    "use_bias_in_norms": True,
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "use_mup": False,
}
"""What transformers' GPT-NeoX is in any case."""
_DEFAULTS = {**_ALONE, "pos_emb": "learned"}
_KEYS = {
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "max_position_embeddings": ("max_position_embeddings", None),
    "initializer_range": ("init_method_std", 0.02),
    "rotary_pct": ("rotary_pct", 1.0),
    "rotary_emb_base": ("rotary_emb_base", 10_000),
    "use_parallel_residual": ("gpt_j_residual", False),
    "layer_norm_eps": ("layernorm_epsilon", 1e-5),
    "attention_dropout": ("attention_dropout", 0.0),
    "hidden_dropout": ("hidden_dropout", 0.0),
}
"""Transformers' key -> the run's, and what it is where the run does not say it."""


def read_settings(sources: Sequence[ByteSource]) -> dict[str, Any]:
    """All files as one, with underscores in keys; the last that says something holds.

    Raises:
        FormatError: one is damaged.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        said = load_yaml_mapping(source.read_all(_LIMIT), source.name)
        merged |= {str(key).replace("-", "_"): value for key, value in said.items()}
    return merged


def others_than_transformers(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a model that transformers' GPT-NeoX is not."""
    for key, value in _ALONE.items():
        said = settings.get(key)
        if (_DEFAULTS[key] if said is None else said) != value:
            yield f"{key} {_DEFAULTS[key] if said is None else said}"
    groups = settings.get("num_kv_heads")
    if groups is not None and groups != settings.get("num_attention_heads"):
        yield f"num_kv_heads {groups}"
    if (settings.get("moe_num_experts") or settings.get("num_experts") or 1) != 1:
        yield "experts"


def configuration(settings: Mapping[str, Any], vocabulary: int, width: int, path: str) -> dict[str, Any]:
    """Transformers' configuration.

    Args:
        settings: the run's.
        vocabulary: rows of the embedding.
        width: of the MLP.
        path: of the checkpoint.

    Raises:
        FormatError: a size is missing.
    """
    config: dict[str, Any] = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu"}
    for own, (key, default) in _KEYS.items():
        value = settings.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"the run's settings lack {key}", path=path, remedy="give a configuration with --config")
        config[own] = value
    return {
        **config,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": not settings.get("no_weight_tying", False),
        "attention_bias": True,
    }
