"""Names of weights in rank files, and the hub's: Megatron-Core's with Transformer Engine's spelling of the norms.

Rank files spell names in three ways.  Megatron-LM before Megatron-Core nests dictionaries
(``language_model.encoder.layers.0.self_attention.query_key_value.weight``; ``transformer`` and ``attention`` until
2021, ``_norm`` for ``_layernorm`` in late 2023).  Megatron-Core's names are flat, and say
``input_layernorm`` with its own layers where Transformer Engine fuses the norm into the linear map that follows.

Facts: ``megatron/legacy/model/{language_model,transformer,bert_model,t5_model}.py`` and
``megatron/core/models/**`` (layer specs' ``sharded_state_dict_keys_map``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from anyckpt.config.hub_names import HEAD_BIAS, HEAD_BIAS_OF_T5
from anyckpt.errors import FormatError

T = TypeVar("T")

_FUSED = {
    "input_layernorm": "self_attention.linear_qkv",
    "pre_mlp_layernorm": "mlp.linear_fc1",
    "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
    "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
}
"""A norm's own module -> the linear map that Transformer Engine fuses it into; where a layer has no such map (a
mixture of experts has no ``linear_fc1``), the norm keeps its module."""
_LAYER = r"(?P<layer>(?:.*\.)?(?:layers\.\d+|transformer_layer|mtp_model_layer))"
_OWN_NORM = re.compile(rf"^{_LAYER}\.(?P<norm>{'|'.join(map(re.escape, _FUSED))})\.(?P<kind>weight|bias)$")
_FUSED_NORM = re.compile(
    rf"^{_LAYER}\.(?P<linear>{'|'.join(map(re.escape, _FUSED.values()))})\.layer_norm_(?P<kind>weight|bias)$"
)
_NESTED = re.compile(r"^(language_model\.|word_embeddings(_for_head)?\.|lm_head\.bias$)")

_STACK = re.compile(r"^language_model\.(?P<stack>encoder|transformer|decoder)\.(?P<rest>.+)$")
_INSIDE_LAYER = re.compile(r"^(?P<layer>layers\.\d+)\.(?P<rest>.+)$")
_MODULES = (
    (r"(?:self_)?attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"(?:self_)?attention\.dense\.", "self_attention.linear_proj."),
    (r"(?:self_)?attention\.(?=[qk]_layernorm\.)", "self_attention."),
    (r"inter_attention\.query\.", "cross_attention.linear_q."),
    (r"inter_attention\.key_value\.", "cross_attention.linear_kv."),
    (r"inter_attention\.dense\.", "cross_attention.linear_proj."),
    (r"mlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"mlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
    (r"mlp\.(?:experts\.)?local_experts\.(\d+)\.dense_h_to_4h\.", r"mlp.experts.local_experts.\1.linear_fc1."),
    (r"mlp\.(?:experts\.)?local_experts\.(\d+)\.dense_4h_to_h\.", r"mlp.experts.local_experts.\1.linear_fc2."),
    (r"input_(?:layer)?norm\.", "input_layernorm."),
)
_PATTERNS = tuple((re.compile(pattern), replacement) for pattern, replacement in _MODULES)
_AFTER_ATTENTION = re.compile(r"^post_attention_(?:layer)?norm\.")
_AFTER_CROSS = re.compile(r"^post_inter_attention_(?:layer)?norm\.")
_FINAL = re.compile(r"^final_(?:layer)?norm\.")
_OUTSIDE = (
    (re.compile(r"^language_model\.(embedding\.)?(word|position|tokentype)_embeddings\."), r"embedding.\2_embeddings."),
    (re.compile(r"^language_model\.(output_layer|pooler)\."), r"\1."),
    (re.compile(r"^word_embeddings(_for_head)?\."), "output_layer."),
    (re.compile(r"^lm_head\.(?:layer)?norm\."), "lm_head.layer_norm."),
)


def strip_wrappers(names: Sequence[str]) -> int:
    """Characters to take off every name: ``module.`` once for each wrapper that the model was saved in."""
    length = 0
    while names and all(name.startswith("module.", length) for name in names):
        length += len("module.")
    return length


def hub_names(shards: Sequence[Mapping[str, T]], paths: Sequence[str]) -> list[dict[str, T]]:
    """The same tensors under the hub's names; layers keep the numbers that their rank gives them.

    All shards are looked at together, because only some tell which model it is: the encoder of a BERT (it has
    token types or a head of its own) and of a T5 (some shard has a decoder) stays ``encoder``, any other is
    Megatron-Core's ``decoder``.  Expert weights keep their spelling.

    Args:
        shards: stored names, dotted and without wrappers, of each rank's chunk.
        paths: each shard's file, for messages.

    Raises:
        FormatError: two names of a shard are the same weight.
    """
    everything = {name for shard in shards for name in shard}
    nested = any(_NESTED.match(name) for name in everything)
    two_stacks = any(name.startswith("language_model.decoder.") for name in everything)
    is_bert = any(re.match(r"^(lm_head\.dense|binary_head|language_model\.pooler)\.", name) for name in everything)
    post_norms = any(name.startswith("language_model.encoder.initial_layernorm.") for name in everything)
    encoder = "encoder" if two_stacks or is_bert or post_norms else "decoder"
    flat: dict[str, str] = {}
    result = []
    for shard, path in zip(shards, paths, strict=True):
        renamed: dict[str, T] = {}
        if nested:
            for name, value in shard.items():
                new = flat.get(name)
                if new is None:
                    new = flat[name] = _flat_name(name, encoder, two_stacks, post_norms)
                _put(renamed, new, value, path)
        result.append(fuse_norms(renamed if nested else shard, path))
    return result


def fuse_norms(shard: Mapping[str, T], path: str = "") -> dict[str, T]:
    """Norms under the linear map that Transformer Engine fuses them into, where the layer has it.

    Raises:
        FormatError: a norm is there in both spellings.
    """
    result: dict[str, T] = {}
    for name, value in shard.items():
        found = _OWN_NORM.match(name)
        if found is not None:
            linear = f"{found['layer']}.{_FUSED[found['norm']]}"
            if f"{linear}.weight" in shard:
                name = f"{linear}.layer_norm_{found['kind']}"
        _put(result, name, value, path)
    return result


def part_norms(shard: Mapping[str, T]) -> dict[str, T]:
    """Norms under their own modules, as Megatron-Core's local layers have them; the inverse of ``fuse_norms``."""
    own = {linear: norm for norm, linear in _FUSED.items()}
    result: dict[str, T] = {}
    for name, value in shard.items():
        found = _FUSED_NORM.match(name)
        result[name if found is None else f"{found['layer']}.{own[found['linear']]}.{found['kind']}"] = value
    return result


def _put(tensors: dict[str, T], name: str, value: T, path: str) -> None:
    if name in tensors:
        raise FormatError("holds a weight under two names", path=path, tensor=name)
    tensors[name] = value


def _flat_name(name: str, encoder: str, two_stacks: bool, post_norms: bool) -> str:
    found = _STACK.match(name)
    if found is None:
        if name == "lm_head.bias":
            return HEAD_BIAS_OF_T5 if two_stacks else HEAD_BIAS
        for pattern, replacement in _OUTSIDE:
            if pattern.match(name):
                return pattern.sub(replacement, name)
        return name
    stack = "decoder" if found["stack"] == "decoder" else encoder
    inside = _INSIDE_LAYER.match(found["rest"])
    if inside is None:
        return f"{stack}.{_FINAL.sub('final_layernorm.', found['rest'])}"
    rest = inside["rest"]
    if post_norms:  # the norms of NeMo 1's post-LN layers have the names of others' norms
        rest = re.sub(r"^input_layernorm\.", "post_att_layernorm.", rest)
        rest = re.sub(r"^post_attention_layernorm\.", "post_mlp_layernorm.", rest)
    cross = two_stacks and stack == "decoder"
    rest = _AFTER_ATTENTION.sub("pre_cross_attn_layernorm." if cross else "pre_mlp_layernorm.", rest)
    rest = _AFTER_CROSS.sub("pre_mlp_layernorm.", rest)
    for match, replacement in _PATTERNS:
        if match.match(rest):
            rest = match.sub(replacement, rest)
            break
    return f"{stack}.{inside['layer']}.{rest}"


def flattened(state: Any, path: str) -> dict[str, Any]:
    """What is in nested dictionaries, by dotted names, in their order.

    Raises:
        FormatError: they are nested deeper than any model's.
    """
    flat: dict[str, Any] = {}
    todo: list[tuple[str, Any, int]] = [("", state, 0)]
    while todo:
        prefix, value, depth = todo.pop()
        if not isinstance(value, dict):
            flat[prefix] = value
        elif depth > 16:
            raise FormatError("the model is nested too deep", path=path, tensor=prefix)
        else:
            parts = [(f"{prefix}.{name}" if prefix else str(name), part, depth + 1) for name, part in value.items()]
            todo.extend(reversed(parts))
    return flat
