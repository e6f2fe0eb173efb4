"""What a rank's ``state_dict`` looks like to PyTorch: the order of its keys, and the states that modules ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from anyckpt.config.hub_names import FINAL_NORM, FINAL_NORM_OF_ENCODER, FINAL_NORM_OF_HYBRIDS

T = TypeVar("T")

_ORDER = (
    *("embedding", "encoder_relative_pos_emb", "decoder_relative_pos_emb", "encoder", "decoder", "mtp"),
    *("lm_head", "output_layer", "binary_head", "pooler"),
    *("word_embeddings", "position_embeddings", "tokentype_embeddings"),
    *("enorm", "hnorm", "eh_proj", "transformer_layer", "mtp_model_layer"),
    *("layers", "final_layernorm", "final_norm"),
    *("input_layernorm", "norm", "mixer", "self_attention", "pre_cross_attn_layernorm", "cross_attention"),
    *("pre_mlp_layernorm", "mlp"),
    *("core_attention", "linear_proj", "linear_qkv", "linear_q", "linear_kv", "linear_q_proj"),
    *("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"),
    *("q_layernorm", "k_layernorm", "kv_layernorm"),
    *("router", "experts", "shared_experts", "local_experts", "linear_fc1", "linear_fc2"),
    *("dense", "layer_norm"),
    *("layer_norm_weight", "layer_norm_bias", "weight", "bias", "expert_bias"),
)
"""Parts of names in the order in which Megatron-Core 0.16's modules register them, for any two parts that can be
siblings.  Megatron's optimizers number parameters in this order."""
_RANK = {part: number for number, part in enumerate(_ORDER)}
_NUMBERED = re.compile(r"([a-z_]*?)(\d{1,9})")
_PARALLEL_LINEAR = re.compile(
    r"^(?:.*\.)?(?:linear_\w+|output_layer|eh_proj|mixer\.in_proj|mixer\.out_proj|layers\.\d+\.(?:self_attention|mlp))$"
)
_WEIGHT = re.compile(r"^(?P<module>.+)\.weight\d*$")
_TWICE = re.compile(r"((?:model\.|module\.|enc_dec_model\.)*)lm_head\.(output_layer\.(?:weight|bias))")
_LAST_NORM = (FINAL_NORM, FINAL_NORM_OF_HYBRIDS, FINAL_NORM_OF_ENCODER)


def registered_order(names: Iterable[str]) -> list[str]:
    """Names in the order of ``named_parameters()``; parts that are not known follow their siblings, as given."""

    def key(name: str) -> tuple[tuple[int, int], ...]:
        return tuple(_part_order(part) for part in name.split("."))

    return sorted(names, key=key)


def with_second_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors, and those that a state dict of Megatron-Core 0.16's has under a second name.

    T5Model makes the output layer of its head a module of its own, too.
    """
    found = {match[1] + match[2]: tensors[match[0]] for match in map(_TWICE.fullmatch, tensors) if match is not None}
    return {**tensors, **{name: tensor for name, tensor in found.items() if name not in tensors}}


def _part_order(part: str) -> tuple[int, int]:
    rank = _RANK.get(part)
    if rank is not None:
        return rank, 0
    numbered = _NUMBERED.fullmatch(part)
    if numbered is None:
        return len(_ORDER), 0
    return _RANK.get(numbered[1], -1 if not numbered[1] else len(_ORDER)), int(numbered[2])


def with_extra_states(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of a ``state_dict``: tensors in order, and after each parallel linear map's ``_extra_state`` None.

    Column- and row-parallel layers have such a state with and without Transformer Engine, and a strict load fails
    where it is missing.  An output layer that shares the embedding's weight has no tensor but has the state.
    """
    tensors = with_second_names(tensors)
    names = registered_order(tensors)
    last: dict[str, str] = {}
    for name in names:
        module = name.rpartition(".")[0]
        found = _WEIGHT.match(name)
        is_map = (found is not None and _PARALLEL_LINEAR.match(module)) or module.endswith("output_layer")
        if is_map or module in last:
            last[module] = name
    after = {name: module for module, name in last.items()}
    tied = "output_layer" not in last and any(name in tensors for name in _LAST_NORM)
    for name in names:
        if tied and _RANK.get(name.partition(".")[0], 0) > _RANK["output_layer"]:
            yield "output_layer._extra_state", None
            tied = False
        yield name, tensors[name]
        if name in after:
            yield f"{after[name]}._extra_state", None
    if tied:
        yield "output_layer._extra_state", None
