"""What a checkpoint's names and objects tell of the layers that a model is built of: Transformer Engine's or local.

Every linear map of a Megatron-Core model, and with Transformer Engine every norm, has a non-tensor state,
``_extra_state`` (FP8 scaling, None without FP8), and Megatron-Core handles keys strictly both ways: a load with the
default strictness fails on the first object that the checkpoint lacks ("Missing key in checkpoint state_dict"), and
one with ``StrictHandling.RAISE_ALL`` on the first that the model does not ask for.  No one set of objects passes both
for both kinds of model, so it goes by the kind where that is known.  Where it is not, all objects are written: that
serves either kind with the default strictness.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp.chunks import stacked_axes
from anyckpt.models.dialects.tensors_of_layers import with_own_norms
from anyckpt.tensor import LazyTensor

Implementation = Literal["local", "transformer_engine"]
"""Megatron-LM's words of ``--transformer-impl``."""

T = TypeVar("T")

_LINEAR = re.compile(
    r"^(?P<module>.*\.(?:linear_\w+|(?:mixer|self_attention)\.(?:in|out)_proj|fc[12]_latent_proj|eh_proj|"
    r"layers\.\d+\.(?:self_attention|mlp)))\.weight(?:_w|\.z)?$"
)
"""Of a weight that is stored in pieces, the name of one."""
_OUTPUT = re.compile(r"^(?P<outer>(?:model\.|module\.)*)(?:lm_head\.)?output_layer\.(?P<kind>weight|bias)$")
_NORM = re.compile(r"^(?P<module>(?:.*\.)?(?:(?:\w+_)?layernorm|final_norm|out_norm|k_norm|[eh]norm))\.weight$")
_LAST_OF_HYBRIDS = re.compile(r"^(?P<outer>(?:model\.|module\.)*)decoder\.final_norm\.weight$")
_ATTENTION = re.compile(r"^(?P<attention>.*(?:self|cross)_attention)\.linear_proj$")
_STATE = re.compile(r"^(chained_\d+\.)?optimizer\.")
_STATE_KEY = re.compile(r"^(?P<module>.*)\._extra_state/shard_(?P<index>\d{1,9}(?:\.\d{1,9})*)_[\d.]+$")
_STACKED = re.compile(r"^(?P<stack>(?:.*\.)?(?:decoder|encoder|mtp)\.layers)\.(?P<rest>(?!\d+\.).*)$")
_OF_TRANSFORMER_ENGINE = re.compile(r"(?:layernorm|core_attention)\._extra_state$")
_BEFORE_EXPERTS = re.compile(r"^(?P<layer>.*\.)pre_mlp_layernorm\.(?P<kind>weight|bias)$")
_OWN_NORM_SINCE = (0, 19)
_AS_IF_FUSED = re.compile(r"^(?P<layer>.*\.)mlp\.linear_fc1\.layer_norm_(?P<kind>weight|bias)$")


def implementation_of(checkpoint: Checkpoint, asked: str | None = None) -> Implementation | None:
    """What the models that will load a checkpoint are built of, None if it may be either.

    ``local`` if the source's arguments say so, or if they say nothing, the source's own states are of linear maps
    alone, and no norm is called as Transformer Engine's layers call it.  That arguments say ``transformer_engine`` is
    Megatron's default and proves nothing.

    Args:
        checkpoint: to be written.
        asked: what the user says, or None.
    """
    if asked is not None:
        return "local" if asked == "local" else "transformer_engine"
    stated = checkpoint.config.get("transformer_impl") if checkpoint.config_kind == "megatron-args" else None
    states = [name for name in checkpoint.ignored if name.endswith("._extra_state")]
    proofs = (*filter(_OF_TRANSFORMER_ENGINE.search, states), *filter(_BEFORE_EXPERTS.match, checkpoint.tensors))
    evident = bool(states) and not proofs
    return "local" if stated == "local" or (stated is None and evident) else None


def spelled(
    tensors: Mapping[str, T], implementation: Implementation | None, release: tuple[int, int] | None = None
) -> dict[str, T]:
    """Tensors under the names that models of this kind ask for.

    They differ in the norm before experts: local layers call it as if it were fused into ``mlp.linear_fc1``.  Where an
    indexer chooses what attention sees, releases differ: those up to 0.18 fuse the norms of queries and keys.

    Args:
        tensors: by the names of a distributed checkpoint.
        implementation: what the model that will load them is built of, None if it may be either.
        release: of Megatron-Core that will load them; None for what 0.16 reads.
    """
    result: dict[str, T] = {}
    newest = (release or (0, 0)) >= _OWN_NORM_SINCE
    for name, tensor in (with_own_norms(tensors) if newest else tensors).items():
        own, fused = _BEFORE_EXPERTS.match(name), _AS_IF_FUSED.match(name)
        if implementation == "local" and own is not None:
            name = f"{own['layer']}mlp.linear_fc1.layer_norm_{own['kind']}"
        elif implementation == "transformer_engine" and fused is not None:
            linear = f"{fused['layer']}mlp.linear_fc1.weight"
            if linear not in tensors and f"{linear}_w" not in tensors:
                name = f"{fused['layer']}pre_mlp_layernorm.{fused['kind']}"
        result[name] = tensor
    return result


def hub_state_name(key: str) -> str | None:
    """The hub's name of the module's state that a distributed checkpoint has under this key, None for another object.

    ``decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.3_2.4`` is expert 3's in layer 1.
    """
    found = _STATE_KEY.match(key)
    if found is None:
        return None
    module, index = found["module"], [int(number) for number in found["index"].split(".")]
    stacked = _STACKED.match(module)
    if stacked is not None:
        module = f"{stacked['stack']}.{index.pop(0)}.{stacked['rest']}"
    expert = ".experts.experts." in module
    module = module.replace(".experts.experts.", ".experts.")
    return f"{module}._extra_state{index[0] if expert and index else ''}"


def extra_states(tensors: Mapping[str, LazyTensor], implementation: Implementation | None = None) -> Iterator[str]:
    """Keys of the objects that models of this kind with these weights ask for; of all kinds if it is None.

    Layers that are stacked in one tensor have an object each, ``<module>._extra_state/shard_{layer}_{layers}``, and
    experts one per layer and expert; a layer under its own number has ``.../shard_0_1``.  Local models ask for those
    of linear maps; Transformer Engine's for those of norms as well, and before Megatron-Core 0.13 for the attention
    kernel's.
    """
    for name, tensor in tensors.items():
        if _STATE.match(name):
            continue
        linear, norm = _LINEAR.match(name), _NORM.match(name)
        modules = []
        if linear is not None:
            modules.append(linear["module"])
            attention = _ATTENTION.match(linear["module"])
            if attention is not None and implementation is None:
                modules.append(f"{attention['attention']}.core_attention")
        elif norm is not None and implementation != "local":
            modules.append(norm["module"])
        hybrid = _LAST_OF_HYBRIDS.match(name)
        if hybrid is not None:  # only GPTModel leaves out what its output layer, tied or not, asks for
            modules.append(f"{hybrid['outer']}output_layer")
        if _has_output_state(name, tensors):
            modules.append(name.rpartition(".")[0])
        grid = tensor.shape[: min(stacked_axes(name), tensor.ndim)] or (1,)
        whole = ".".join(map(str, grid))
        for module in modules:
            for index in np.ndindex(*grid):
                yield f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{whole}"


def _has_output_state(name: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a tensor is of an output layer that asks for a state: that of a BERT or T5; a GPT's does not.

    A BERT's has a bias, and so has a T5's that is tied; one that is not tied has none, and is part of ``lm_head``.
    """
    found = _OUTPUT.match(name)
    if found is None:
        return False
    return found["kind"] == "bias" or f"{found['outer']}lm_head.output_layer.weight" in tensors
