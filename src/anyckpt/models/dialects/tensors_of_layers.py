"""Layers and experts in one tensor or each in its own, halves saved apart, and norms of their own or fused.

A distributed checkpoint has one tensor for all layers, with a leading layer axis; the hub has one for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from anyckpt.errors import MappingError
from anyckpt.models.dialects.mamba_sections import has_mixers
from anyckpt.tensor import LazyTensor, concatenate, stack

T = TypeVar("T")

_LAYER = re.compile(r"((?:decoder|encoder)\.layers)\.(\d{1,7})\.(.+)")
_STACK = re.compile(r"((?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)")
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000

_NORMS = (
    ("input_layernorm", "self_attention.linear_qkv.layer_norm", "self_attention.linear_qkv.weight"),
    ("input_layernorm", "self_attention.in_proj.layer_norm", "self_attention.in_proj.weight"),
    ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm", "mlp.linear_fc1.weight"),
    (
        "self_attention.q_layernorm",
        "self_attention.linear_q_up_proj.layer_norm",
        "self_attention.linear_q_up_proj.weight",
    ),
    (
        "self_attention.kv_layernorm",
        "self_attention.linear_kv_up_proj.layer_norm",
        "self_attention.linear_kv_up_proj.weight",
    ),
    ("norm", "mixer.in_proj.layer_norm", "mixer.in_proj.weight"),
    ("input_layernorm", "self_attention.layer_norm", "self_attention.weight"),
    ("pre_mlp_layernorm", "mlp.layer_norm", "mlp.weight"),
)
"""Local specification's module, Transformer Engine's prefix of the fused norm, and the tensor that the layer must
have for the norm to be fused into it (the norm before mixture-of-experts or latent attention has no such home)."""

_OF_INDEXER = ".self_attention.core_attention.indexer."
_INDEXED_NORM = re.compile(
    r"(?P<attention>.*\.self_attention)\.linear_(?P<which>q|kv)_up_proj\.layer_norm_(?P<kind>weight|bias)"
)

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d{1,7})")
"""One expert's tensor under the hub's name, which is that of Transformer Engine's grouped layers."""

_EXPERT_MODULE = re.compile(r"(.+\.mlp\.experts)\.(?:local_experts|experts)\.(\d+)\.(linear_fc[12])\.(weight|bias)")
"""One expert's tensor where experts are modules of their own, or in a checkpoint of single experts."""

_EXPERT_STACK = re.compile(r"(.+\.mlp\.experts)\.experts\.(linear_fc[12])\.(weight|bias)")
"""All experts' tensor of a layer in a distributed checkpoint; the word is doubled there."""

_HALF = re.compile(r"(?P<whole>(?:.+\.)?linear_fc1\.(?:weight|bias)\d*)_(?P<half>[wv])")
"""Gate and up projection that ``singleton_local_shards`` saves apart."""


def put(tensors: dict[str, LazyTensor], key: str, tensor: LazyTensor, stored: str) -> None:
    """Give a tensor a name.

    Raises:
        MappingError: another has it.
    """
    if key in tensors:
        raise MappingError("two stored tensors are the same one of the model", tensor=stored, found=key)
    tensors[key] = tensor


def is_of_all_layers(name: str) -> bool:
    """Whether a name is one of a tensor in which all layers are stacked."""
    return _STACK.fullmatch(name) is not None


def unstacked(name: str, tensor: LazyTensor) -> Iterable[tuple[str, LazyTensor]]:
    """Every layer's part of a tensor, if its name says that it has all layers', else the tensor itself.

    Raises:
        MappingError: there are too many layers for a model.
    """
    match = _STACK.fullmatch(name)
    if match is None or not tensor.ndim:
        return [(name, tensor)]
    layers = tensor.shape[0]
    if layers > _MOST_LAYERS:
        raise MappingError("has too many layers", tensor=name, expected=f"at most {_MOST_LAYERS}", found=layers)
    return [(f"{match[1]}.{layer}.{match[2]}", tensor[layer]) for layer in range(layers)]


def _grouped(
    tensors: Mapping[str, LazyTensor], pattern: re.Pattern[str], place: Callable[[re.Match[str]], tuple[str, int]]
) -> tuple[dict[str, LazyTensor], dict[str, dict[int, LazyTensor]]]:
    """What is to be stacked, by its name and its number there; and all tensors with the first of each in its place."""
    stacks: dict[str, dict[int, LazyTensor]] = {}
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            key, number = place(match)
            stacks.setdefault(key, {})[number] = tensor
            result.setdefault(key, tensor)
    return result, stacks


def stacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Layers stacked where all of a stack have the same tensors, as Megatron-Core does; otherwise as they are."""
    if has_mixers(tensors):
        return dict(tensors)  # Megatron-Core's MambaStack numbers its layers whatever they are
    result, stacks = _grouped(tensors, _LAYER, lambda layer: (f"{layer[1]}.{layer[3]}", int(layer[2])))
    for encoder_or_decoder in dict.fromkeys(key.partition(".")[0] for key in stacks):
        own = {key: layers for key, layers in stacks.items() if key.startswith(f"{encoder_or_decoder}.")}
        counts = {len(layers) for layers in own.values()}
        shapes_agree = all(len({(t.shape, t.dtype.name) for t in layers.values()}) == 1 for layers in own.values())
        if len(counts) > 1 or not shapes_agree or any(set(s) != set(range(len(s))) for s in own.values()):
            return dict(tensors)
        for key, layers in own.items():
            result[key] = stack([layers[number] for number in range(len(layers))])
    return result


def separate_experts(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Experts each in tensors of their own, under the hub's names.

    Raises:
        MappingError: there are too many for a model, or two are the same one.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, whole = _EXPERT_MODULE.fullmatch(name), _EXPERT_STACK.fullmatch(name)
        if module is not None:
            put(result, f"{module[1]}.{module[3]}.{module[4]}{module[2]}", tensor, name)
        elif whole is not None and tensor.ndim:
            if tensor.shape[0] > _MOST_EXPERTS:
                raise MappingError(
                    "has too many experts", tensor=name, expected=f"at most {_MOST_EXPERTS}", found=tensor.shape[0]
                )
            for expert in range(tensor.shape[0]):
                put(result, f"{whole[1]}.{whole[2]}.{whole[3]}{expert}", tensor[expert], name)
        else:
            put(result, name, tensor, name)
    return result


def stacked_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The experts of a layer stacked, as distributed checkpoints have them.

    Raises:
        MappingError: one is missing.
    """
    result, stacks = _grouped(tensors, _EXPERT, lambda one: (f"{one[1]}.experts.{one[2]}.{one[3]}", int(one[4])))
    for key, experts in stacks.items():
        if set(experts) != set(range(len(experts))):
            missing = min(set(range(len(experts))) - set(experts))
            raise MappingError(f"expert {missing} is missing", tensor=key)
        result[key] = stack([experts[number] for number in range(len(experts))])
    return result


def with_own_norms(tensors: Mapping[str, T]) -> dict[str, T]:
    """The norms of latent queries and keys as modules of their own, where an indexer chooses what attention sees.

    Since 0.19 these layers of Megatron-Core absorb a projection (``experimental_attention_variant/absorbed_mla.py``);
    those of 0.16 to 0.18 fuse the norms into the projections, as all other latent attention does.
    """
    if not any(_OF_INDEXER in name for name in tensors):
        return dict(tensors)
    return {_INDEXED_NORM.sub(r"\g<attention>.\g<which>_layernorm.\g<kind>", name): t for name, t in tensors.items()}


def joined_halves(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Gate and up projections that were saved apart in one tensor.

    Raises:
        MappingError: one has no other half.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _HALF.fullmatch(name)
        if found is None:
            put(result, name, tensor, name)
            continue
        gate, up = (tensors.get(f"{found['whole']}_{half}") for half in "wv")
        if gate is None or up is None:
            raise MappingError("the other half of a gated projection is missing", tensor=name)
        if found["half"] == "w":
            put(result, found["whole"], concatenate([gate, up], 0), name)
    return result


def fused_norms(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Norms under Transformer Engine's names: fused into the linear layer after them where the layer has one."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        key = name
        match = _LAYER.fullmatch(name)
        if match is not None:
            layer = f"{match[1]}.{match[2]}."
            for module, fused, home in _NORMS:
                if match[3].startswith(f"{module}.") and layer + home in tensors:
                    key = layer + fused + match[3][len(module) :].replace(".", "_")
                elif match[3].startswith(f"{fused}_") and layer + home not in tensors:
                    key = f"{layer}{module}.{match[3][len(fused) + 1 :]}"
        put(result, key, tensor, name)
    return result
