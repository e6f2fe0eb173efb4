"""The fixtures of families with experts, latent attention or mixers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.models import Model
from anyckpt.tensor import LazyTensor, concatenate, stack

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "deepseek_v2_lite", "gpt_oss", "nemotron_h")

UNSAYABLE: dict[str, tuple[str, ...]] = {
    "qwen2_moe": ("nemo2",),
    "deepseek_v3": ("nemo1",),
    "deepseek_v2_lite": ("nemo1",),
    "gpt_oss": ("nemo1",),
    "nemotron_h": ("nemo1",),
}
"""Kinds of configuration that have no such models."""

NOT_IN_THE_HUB: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("kv_channels",),
    "deepseek_v2_lite": ("kv_channels",),
}
"""Fields of the fixture that say nothing about its weights."""

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
_GATE_UP = {"w1": 0, "w3": 1, "gate_proj": 0, "up_proj": 1}


def other_spelling(name: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights as transformers 5 has them in memory."""
    result: dict[str, LazyTensor] = {}
    experts: dict[str, dict[int, dict[str, LazyTensor]]] = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key)
        if match is not None:
            prefix = _in_memory(match[1])
            experts.setdefault(prefix, {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            result[_in_memory(key)] = tensor
    for prefix, each in experts.items():
        first, down = [], []
        for number in range(len(each)):
            parts = {_GATE_UP[word]: tensor for word, tensor in each[number].items() if word in _GATE_UP}
            first.append(concatenate([parts[index] for index in sorted(parts)], 0))
            down.append(next(tensor for word, tensor in each[number].items() if word in ("w2", "down_proj")))
        gated = len(parts) == 2
        result[f"{prefix}.experts.{'gate_up_proj' if gated else 'up_proj'}"] = stack(first)
        result[f"{prefix}.experts.down_proj"] = stack(down)
    return result


_WITHOUT_EXPERTS = {
    "num_moe_experts": None, "moe_router_topk": None, "moe_ffn_hidden_size": None, "moe_router_num_groups": None,
    "moe_router_group_topk": None, "moe_router_topk_scaling_factor": None, "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None, "moe_router_score_function": "softmax",
}  # fmt: skip


def _in_memory(name: str) -> str:
    return name.replace("block_sparse_moe", "mlp").replace("backbone.", "model.")


def rendered_like(name: str, model: Model) -> Iterator[Model]:
    """The fixture's model, and others of its family whose configurations differ."""
    yield model
    if model.config.hybrid_override_pattern is not None:
        yield _changed(model, moe_router_topk_scaling_factor=1.5, mamba_state_dim=16, init_method_std=0.01)
        yield _changed(model, hybrid_override_pattern="M*-M-", **_WITHOUT_EXPERTS)
        return
    if model.config.multi_latent_attention:
        yarn = {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
        }  # fmt: skip
        yield _changed(model, rope_scaling=yarn)
    if name == "gpt_oss":
        yarn = {
            "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False,
        }  # fmt: skip
        yield _changed(model, rope_scaling=yarn)
        yield _changed(model, window_size=None, window_attn_skip_freq=None, activation_func_clamp_value=5.0)
    yield _changed(model, rotary_base=5e5, moe_aux_loss_coeff=0.125, init_method_std=0.01)


def _changed(model: Model, **fields: Any) -> Model:
    return replace(model, config=replace(model.config, **fields))
