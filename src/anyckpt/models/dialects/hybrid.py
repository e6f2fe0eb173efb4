"""Names of a decoder's blocks in halves, as Megatron-Core's HybridModel has them, and as the hub and GPTModel do.

Block i is the layers 2i, with attention, and 2i + 1, with the MLP or experts, and the last norm is ``final_norm``.
Facts: ``models/hybrid/hybrid_block.py`` and ``dist_checkpointing/gpt_checkpoint_interop.py`` of Megatron-Core 0.19.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from anyckpt.errors import MappingError

T = TypeVar("T")

_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d{1,7})\.(?P<rest>(?P<part>\w+)\..+)")
_ATTENTION = ("input_layernorm", "self_attention")
_MLP = ("pre_mlp_layernorm", "mlp")
_NORM_BEHIND = ".post_layernorm."
"""In a module of Megatron-Bridge's, which a norm follows; ``hybrid_stack_spec`` has no place for that."""
_GPT_NORM, _HYBRID_NORM = "decoder.final_layernorm.", "decoder.final_norm."
_OUTSIDE = ("embedding.", "output_layer.", _GPT_NORM)


def in_halves(names: Iterable[str]) -> bool:
    """Whether the hub's names, one layer each, are of a HybridModel of nothing but blocks in halves."""
    found, layers = False, set[tuple[bool, bool]]()
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is not None:
            layers.add((int(match["layer"]) % 2 == 0, match["part"] in _ATTENTION))
            if match["part"] not in (*_ATTENTION, *_MLP):
                return False
        found = found or name.startswith(_HYBRID_NORM)
    return found and layers == {(True, True), (False, False)}


def has_halves(names: Iterable[str]) -> bool:
    """Whether stored names, of whichever of Megatron's dialects, have a HybridModel's last norm."""
    return any(f".{name}".endswith(f".{_HYBRID_NORM}weight") for name in names)


def as_blocks(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of halves under the hub's names, two layers as one; those that are in no layer keep theirs."""
    return {block_name(name): tensor for name, tensor in tensors.items()}


def as_halves(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of the hub as those of halves.

    Raises:
        MappingError: a tensor is in no half.
    """
    return {half_name(name): tensor for name, tensor in tensors.items()}


def block_name(name: str) -> str:
    """The hub's name of what a HybridModel calls so."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        return f"decoder.layers.{int(match['layer']) // 2}.{match['rest']}"
    return _GPT_NORM + name.removeprefix(_HYBRID_NORM) if name.startswith(_HYBRID_NORM) else name


def half_name(name: str) -> str:
    """A HybridModel's name of what the hub calls so.

    Raises:
        MappingError: it has no such tensor.
    """
    match = _LAYER.fullmatch(name)
    if match is not None and match["part"] in (*_ATTENTION, *_MLP) and _NORM_BEHIND not in name:
        return f"decoder.layers.{2 * int(match['layer']) + (match['part'] in _MLP)}.{match['rest']}"
    if name.startswith(_GPT_NORM):
        return _HYBRID_NORM + name.removeprefix(_GPT_NORM)
    if not name.startswith(_OUTSIDE):
        raise MappingError(
            "Megatron-Core's HybridModel of blocks in halves has no such tensor",
            tensor=name,
            remedy="leave --megatron-model out, which writes a GPTModel",
        )
    return name
