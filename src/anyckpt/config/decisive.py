"""Keys of ``config.json`` that change what a model computes, though its tensors' names and shapes stay the same.

A family whose tables read such a key says what becomes of it.  For any other the key must say what the model does
without it; else the weights would be taken for those of a model that computes something else.  The keys are those that
transformers 5.24's decoders read, and those of models that bring their own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

from anyckpt.errors import MappingError

Neutral = Callable[[Any, Mapping[str, Any]], bool]
"""Whether a value, of a key in this configuration, changes nothing."""

_LARGEST = 1e30


def _is(*values: Any) -> Neutral:
    return lambda value, config: any(type(value) is type(each) and value == each for each in values)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _one(value: Any, config: Mapping[str, Any]) -> bool:
    return all(_number(each) and each == 1 for each in (value if isinstance(value, list) else [value]))


def _is_off(value: Any, config: Mapping[str, Any]) -> bool:
    return value in (False, [], {}) or (_number(value) and value == 0)


def _is_usual_scale(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether scores are multiplied by this as they are anyway: by one over the root of a head's width."""
    width = _head(config)
    return _number(value) and width > 0 and math.isclose(value, width**-0.5, rel_tol=1e-6)


def _is_head(value: Any, config: Mapping[str, Any]) -> bool:
    return _number(value) and value == _head(config)


def _head(config: Mapping[str, Any]) -> float:
    stated, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if _number(stated):
        return float(stated)
    return hidden / heads if _number(hidden) and _number(heads) and heads else 0.0


def _is_wide(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a window is as long as any text, or switched off."""
    longest = config.get("max_position_embeddings")
    return config.get("use_sliding_window") is False or (_number(value) and _number(longest) and value >= longest)


def _all_full(value: Any, config: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(each == "full_attention" for each in value)


def _all_rotary(value: Any, config: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(each in (1, True) for each in value)


_MULTIPLIERS = tuple(
    """
    embedding_multiplier residual_multiplier logits_scaling logit_scale output_multiplier lm_head_multiplier
    key_multiplier mlp_multipliers attention_in_multiplier attention_out_multiplier ssm_in_multiplier
    ssm_out_multiplier ssm_multipliers scale_emb embedding_scale mup_width_scale mup_attn_multiplier
    mup_embeddings_multiplier mup_output_alpha mup_output_multiplier rope_scale logits_scale residual_scale
    """.split()
)
_SWITCHES = tuple(
    """
    rope_interleave rope_interleaved rotary_interleaved use_qk_norm qk_norm qk_layernorm use_qk_layernorm use_qkv_norm
    use_qk_l2_norm attn_output_gate attention_output_gate use_sliding_window attn_logit_softcapping
    final_logit_softcapping logits_soft_cap attn_logit_softcap logit_softcap clip_qkv alibi use_alibi parallel_attn
    use_parallel_residual parallel_residual parallel_block use_parallel_block norm_after use_post_norm post_norm
    use_sandwich_norm rms_norm_add_unit_offset rmsnorm_gemma use_mup attn_temperature_tuning use_attention_sinks
    attention_sinks use_bidirectional_attention no_rope_layer_interval nope_layer_interval attention_chunk_size
    use_attn_gate use_head_wise_attn_gate use_gated_attention zero_centered_gamma apply_layernorm_1p
    """.split()
)
NEUTRAL: Mapping[str, Neutral] = {
    **dict.fromkeys(_MULTIPLIERS, _one),
    **dict.fromkeys(_SWITCHES, _is_off),
    "attention_multiplier": _is_usual_scale,
    "query_pre_attn_scalar": _is_head,
    "scale_depth": _is(-1),
    "sliding_window": _is_wide,
    "layer_types": _all_full,
    "no_rope_layers": _all_rotary,
    "is_causal": _is(True),
}
"""By key, when it changes nothing; absent and null never do."""


def check_decisive(family: str, config: Mapping[str, Any], known: Collection[str]) -> None:
    """Every key that changes what the model computes is one that the family's tables know, or changes nothing.

    Args:
        family: its name.
        config: what of a ``config.json`` is the family's.
        known: keys that the family's tables look after.

    Raises:
        MappingError: there is one that would be lost.
    """
    for key, is_neutral in NEUTRAL.items():
        value = config.get(key)
        if value is not None and key not in known and not is_neutral(value, config):
            raise MappingError(
                f"config.json's {key} changes what the model computes, and family {family} has no such thing",
                expected="a model without it",
                found=repr(value)[:80],
                remedy="choose the family that the model is of with --family, or convert to safetensors, torch or dcp, "
                "which keep names",
            )
