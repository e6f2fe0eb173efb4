"""Names of a decoder's blocks in halves, as Megatron-Core's HybridModel has them, and as the hub and GPTModel do.

Block i is the layers 2i, with attention, and 2i + 1, with the MLP or experts, and the last norm is ``final_norm``.  The
block of a step of multi-token prediction is a stack of its own of two such layers, the module ``mtp_model_layer``.
Facts: ``models/hybrid/hybrid_block.py``, ``transformer/multi_token_prediction.py`` and
``dist_checkpointing/gpt_checkpoint_interop.py`` of Megatron-Core 0.19.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from anyckpt.errors import MappingError
from anyckpt.models.dialects.tensors_of_layers import with_own_norms

T = TypeVar("T")

_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d{1,7})\.(?P<rest>(?P<part>\w+)\..+)")
_FURTHER = re.compile(r"(?P<step>mtp\.layers\.\d{1,7})\.transformer_layer\.(?P<rest>(?P<part>\w+)\..+)")
"""In the hub's block of a step of multi-token prediction."""
_FURTHER_LAYER = re.compile(
    r"(?P<step>mtp\.layers\.\d{1,7})\.(?P<stack>transformer_layer|mtp_model_layer)\.layers\.(?P<layer>\d{1,7})"
    r"\.(?P<rest>(?P<part>\w+)\..+)"
)
"""In a layer of a step's own stack; the hub calls the stack as it calls a block."""
_STACK = r"\g<step>.mtp_model_layer.layers.\g<layer>.\g<rest>"
_ATTENTION = ("input_layernorm", "self_attention")
_MLP = ("pre_mlp_layernorm", "mlp")
_NORM_BEHIND = ".post_layernorm."
"""In a module of Megatron-Bridge's, which a norm follows; ``hybrid_stack_spec`` has no place for that."""
_GPT_NORM, _HYBRID_NORM = "decoder.final_layernorm.", "decoder.final_norm."
_OUTSIDE = ("embedding.", "output_layer.", _GPT_NORM)
_OF_STEP = re.compile(r"mtp\.layers\.\d{1,7}\.(?:enorm|hnorm|eh_proj|final_layernorm)\..+")


def in_halves(names: Iterable[str]) -> bool:
    """Whether the hub's names, one layer each, are of a HybridModel of nothing but blocks in halves."""
    found, layers, further = False, set[tuple[bool, bool]](), set[tuple[bool, bool]]()
    for name in names:
        match = _LAYER.fullmatch(name) or _FURTHER_LAYER.fullmatch(name)
        if match is not None:
            place = (int(match["layer"]) % 2 == 0, match["part"] in _ATTENTION)
            (layers if match.re is _LAYER else further).add(place)
            if match["part"] not in (*_ATTENTION, *_MLP) or (match.re is _FURTHER_LAYER and int(match["layer"]) > 1):
                return False
        found = found or name.startswith(_HYBRID_NORM)
    halves = {(True, True), (False, False)}
    return found and layers == halves and further in (set(), halves)


def has_halves(names: Iterable[str]) -> bool:
    """Whether stored names, of whichever of Megatron's dialects, have a HybridModel's last norm."""
    return any(f".{name}".endswith(f".{_HYBRID_NORM}weight") for name in names)


def as_blocks(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of halves under the hub's names, two layers as one; those that are in no layer keep theirs."""
    return {block_name(name): tensor for name, tensor in tensors.items()}


def as_halves(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of the hub as those of halves; norms are modules of their own where an indexer chooses.

    Raises:
        MappingError: a tensor is in no half.
    """
    return {half_name(name): tensor for name, tensor in with_own_norms(tensors).items()}


def with_stacks(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of the hub as any HybridModel or GPTModel calls them: a step's stack of layers is ``mtp_model_layer``."""
    return {_FURTHER_LAYER.sub(_STACK, name): tensor for name, tensor in tensors.items()}


def block_name(name: str) -> str:
    """The hub's name of what a HybridModel calls so."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        return f"decoder.layers.{int(match['layer']) // 2}.{match['rest']}"
    further = _FURTHER_LAYER.fullmatch(name)
    if further is not None:
        return f"{further['step']}.transformer_layer.{further['rest']}"
    return _GPT_NORM + name.removeprefix(_HYBRID_NORM) if name.startswith(_HYBRID_NORM) else name


def half_name(name: str) -> str:
    """A HybridModel's name of what the hub calls so.

    Raises:
        MappingError: it has no such tensor.
    """
    match, further = _LAYER.fullmatch(name), _FURTHER.fullmatch(name)
    found = match or further
    if found is not None and found["part"] in (*_ATTENTION, *_MLP) and _NORM_BEHIND not in name:
        second = int(found["part"] in _MLP)
        if match is None:
            return f"{found['step']}.mtp_model_layer.layers.{second}.{found['rest']}"
        return f"decoder.layers.{2 * int(match['layer']) + second}.{found['rest']}"
    if name.startswith(_GPT_NORM):
        return _HYBRID_NORM + name.removeprefix(_GPT_NORM)
    if not name.startswith(_OUTSIDE) and _OF_STEP.fullmatch(name) is None:
        raise MappingError(
            "Megatron-Core's HybridModel of blocks in halves has no such tensor",
            tensor=name,
            remedy="leave --megatron-model out, which writes a GPTModel",
        )
    return name
