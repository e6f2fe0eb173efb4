"""Names of Megatron's and NeMo 1's own modules, from before Megatron-Core.

``language_model.encoder.layers.0.self_attention.query_key_value.weight``: what NeMo 1's converters write with
``mcore_gpt: false`` (``convert_llama_hf_to_nemo.py``, ``convert_baichuan2_hf_to_nemo.py``), and training did until
Megatron-Core was the default.  Tensors are laid out as Megatron-Core's; only a gated MLP may be in two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from anyckpt.config.hub_names import HEAD_BIAS
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, concatenate

EVIDENCE = r"language_model\.(?:embedding\.)?word_embeddings\.weight"
"""Pattern of a name that only these modules give."""

_STACK = re.compile(r"language_model\.(?:encoder|transformer)\.(.+)")
_OUTSIDE = (
    (re.compile(r"language_model\.(?:embedding\.)?((?:word|position|tokentype)_embeddings\..+)"), r"embedding.\1"),
    (re.compile(r"language_model\.((?:output_layer|pooler)\..+)"), r"\1"),
    (re.compile(r"lm_head\.bias"), HEAD_BIAS),
    (re.compile(r"lm_head\.(?:layer)?norm\.(.+)"), r"lm_head.layer_norm.\1"),
)
_INSIDE = (
    ("self_attention.query_key_value.", "self_attention.linear_qkv."),
    ("self_attention.dense.", "self_attention.linear_proj."),
    ("post_attention_layernorm.", "pre_mlp_layernorm."),
    ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
)
_AFTER = (("input_layernorm.", "post_att_layernorm."), ("post_attention_layernorm.", "post_mlp_layernorm."))
"""Norms that are behind what others' norms of these names are before: of layers after ``initial_layernorm``."""
_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_UP = re.compile(r"(.+\.mlp\.dense_h_to_4h)_2\.(weight|bias)")


def own_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The hub's tensors of a decoder under the names of own modules, with gated MLPs whole (``fast-swiglu``)."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        rest = name.replace("decoder.", "encoder.", 1)
        for own, core in _FUSED + _INSIDE:
            rest = rest.replace(core, own, 1)
        result[f"language_model.{rest}"] = tensor
    return result


def core_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors under Megatron-Core's names for local layers, where they have those of own modules; else as they are.

    An encoder is a decoder but in BERT, which has a pooler or a head of its own.  Models with two stacks keep their
    names.

    Raises:
        MappingError: half of a gated MLP is missing, or differs in shape or type.
    """
    if not any(name.startswith("language_model.") for name in tensors):
        return dict(tensors)
    if any(name.startswith("language_model.decoder.") for name in tensors):
        return dict(tensors)
    bert = any(name.startswith(("language_model.pooler.", "lm_head.dense.", "binary_head.")) for name in tensors)
    inside: tuple[tuple[str, str], ...] = _INSIDE
    if any(name.startswith("language_model.encoder.initial_layernorm.") for name in tensors):
        bert, inside = True, _AFTER + _INSIDE
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _UP.fullmatch(name)
        if found is not None:
            _gate(name, found, tensors)
            continue
        up = tensors.get(_second(name))
        whole = tensor if up is None else concatenate([tensor, up], 0)
        result[_core_name(name, "encoder" if bert else "decoder", inside)] = whole
    return result


def _second(name: str) -> str:
    """Name of the up projection, were this the gate."""
    return name.replace(".mlp.dense_h_to_4h.", ".mlp.dense_h_to_4h_2.") if ".mlp.dense_h_to_4h." in name else ""


def _gate(name: str, found: re.Match[str], tensors: Mapping[str, LazyTensor]) -> None:
    gate, up = tensors.get(f"{found[1]}.{found[2]}"), tensors[name]
    if gate is None or gate.shape != up.shape or gate.dtype != up.dtype:
        raise MappingError(
            "the other half of a gated projection is missing or different",
            tensor=name,
            expected=f"{found[1]}.{found[2]} of shape {up.shape}",
            found="none" if gate is None else gate.shape,
        )


def _core_name(name: str, stack: str, inside: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in _OUTSIDE:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    found = _STACK.fullmatch(name)
    if found is None:
        return name
    rest = found[1]
    for own, core in inside:
        rest = rest.replace(own, core, 1)
    return f"{stack}.{rest}"
