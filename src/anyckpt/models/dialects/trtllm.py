"""TensorRT-LLM's names of a decoder's tensors, whole: what its ranks hold, joined.

Facts: NVIDIA ModelOpt 0.40's export and TensorRT-LLM's model classes.  Query, key and value rows lie one after the
other, not interleaved by group.  ``fc`` is the branch that is activated (transformers' ``gate_proj``) and ``gate`` the
other one; stacked experts, and the one for every token, have them the other way round, ``[up; gate]``, in one tensor.
Norms are stored as gamma
where the family's are gamma - 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import MappingError
from anyckpt.identity import ElementWise
from anyckpt.indexing import Array
from anyckpt.models.language.rule_operations import INTERLEAVED_QKV
from anyckpt.tensor import LazyTensor, Mapped, concatenate, stack

NAME = "trtllm"

_EVIDENCE = re.compile(r"transformer\.layers\.\d+\.attention\.qkv\.weight")

_TOP = {
    EMBEDDING: "transformer.vocab_embedding.weight",
    "embedding.position_embeddings.weight": "transformer.position_embedding.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    HEAD: "lm_head.weight",
}
_MODULES = {
    "self_attention.linear_proj": "attention.dense",
    "self_attention.q_layernorm": "attention.q_layernorm",
    "self_attention.k_layernorm": "attention.k_layernorm",
    "mlp.linear_fc2": "mlp.proj",
    "mlp.router": "mlp.router",
    "mlp.shared_experts.linear_fc2": "mlp.shared_expert.proj",
}
_SHARED_FC = ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_expert.fc.weight")
_SHARED_GATE = ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight")
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_layernorm.",
    "pre_mlp_layernorm.": "post_layernorm.",
}
_OUTER_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_proj.post_layernorm.": "post_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_feedforward_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_feedforward_layernorm.",
}
"""Of layers that have norms after attention and MLP, too."""
_OUTER = "self_attention.linear_proj.post_layernorm.weight"

_HUB_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)")
_NORM_WEIGHT = re.compile(r"transformer\.(?:.*layernorm|ln_f)\.weight")


def is_of(names: Iterable[str]) -> bool:
    """Whether names are TensorRT-LLM's."""
    return any(_EVIDENCE.fullmatch(name) for name in names)


def from_hub_names(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """The hub's tensors under TensorRT-LLM's names; views, but for norms of families that store gamma - 1.

    Raises:
        MappingError: TensorRT-LLM's decoders have no such tensor.
    """
    result: dict[str, LazyTensor] = {}
    experts: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _HUB_LAYER.fullmatch(name)
        if match is None:
            if name not in _TOP:
                raise _no_place(name)
            result[_TOP[name]] = tensor
            continue
        layer = f"transformer.layers.{match[1]}."
        expert = _EXPERT.fullmatch(match[2])
        if expert is not None:
            key = f"{layer}mlp.{'fc' if expert[1] == '1' else 'proj'}.weight"
            experts.setdefault(key, {})[int(expert[2])] = _upside_down(tensor) if expert[1] == "1" else tensor
            result.setdefault(key, tensor)
            continue
        outer = f"decoder.layers.{match[1]}.{_OUTER}" in tensors
        for key, part in _of_layer(match[2], tensor, config, outer, name):
            result[layer + key] = part
    for key, found in experts.items():
        result[key] = stack([found[number] for number in sorted(found)])
    return {name: _stored(name, tensor, config) for name, tensor in result.items()}


def _of_layer(
    name: str, tensor: LazyTensor, config: ModelConfig, outer: bool, full: str
) -> Iterable[tuple[str, LazyTensor]]:
    module, _, kind = name.rpartition(".")
    if module == "self_attention.linear_qkv" and kind in ("weight", "bias"):
        return [(f"attention.qkv.{kind}", concatenate(list(INTERLEAVED_QKV.from_hub(tensor, config)), 0))]
    if name == _SHARED_FC[0]:
        return [(_SHARED_FC[1], _upside_down(tensor))]
    if name == _SHARED_GATE[0]:
        return [(_SHARED_GATE[1], tensor)]
    if module == "mlp.linear_fc1" and kind in ("weight", "bias"):
        if not config.gated_linear_unit:
            return [(f"mlp.fc.{kind}", tensor)]
        half = tensor.shape[0] // 2
        return [(f"mlp.fc.{kind}", tensor.narrow(0, 0, half)), (f"mlp.gate.{kind}", tensor.narrow(0, half, half))]
    for hub, own in (_OUTER_NORMS if outer else _NORMS).items():
        if name.startswith(hub):
            return [(own + name.removeprefix(hub), tensor)]
    if module in _MODULES:
        return [(f"{_MODULES[module]}.{kind}", tensor)]
    raise _no_place(full)


def _stored(name: str, tensor: LazyTensor, config: ModelConfig) -> LazyTensor:
    if config.layernorm_zero_centered_gamma and _NORM_WEIGHT.fullmatch(name):
        return _Gamma(tensor, tensor.dtype)
    if name.endswith(".mlp.router.weight"):
        return tensor.cast("float32")
    return tensor


class _Gamma(Mapped):
    """A norm's weight plus 1, rounded once, to whatever type it is cast to."""

    __slots__ = ()

    def __init__(self, less_one: LazyTensor, to: DType) -> None:
        super().__init__((less_one,), to, _PlusOne(to))

    def cast(self, to: DType | str) -> LazyTensor:
        return _Gamma(self.children[0], dtype(to))


@dataclass(frozen=True)
class _PlusOne(ElementWise):
    """One more, computed in float32, or float64 of such, and rounded to ``to``."""

    to: DType

    def __call__(self, less_one: Array) -> Array:
        wide = less_one.astype(np.float64 if less_one.dtype.itemsize == 8 else np.float32)
        result: Array = (wide + 1).astype(self.to.numpy or wide.dtype)
        return result


def to_hub_names(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """Whole tensors of TensorRT-LLM's under the hub's names; norms stay as they are stored.

    Names that TensorRT-LLM's decoders do not have are kept.

    Raises:
        MappingError: a part of a projection is missing, or rows are not those of the configuration's heads.
    """
    top = {own: hub for hub, own in _TOP.items()}
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            result[top.get(name, name)] = tensor
            continue
        layer = f"decoder.layers.{match[1]}."
        for key, part in _of_own_layer(match[2], name, tensors, config):
            result[layer + key] = part
    return result


def _of_own_layer(
    name: str, full: str, tensors: Mapping[str, LazyTensor], config: ModelConfig
) -> Iterable[tuple[str, LazyTensor]]:
    module, _, kind = name.rpartition(".")
    tensor = tensors[full]
    layer = full.removesuffix(name)
    if module == "attention.qkv" and kind in ("weight", "bias"):
        return [(f"self_attention.linear_qkv.{kind}", _interleaved(full, tensor, config))]
    if module == "mlp.fc" and kind in ("weight", "bias"):
        if tensor.ndim == 3:
            return [(f"mlp.experts.linear_fc1.weight{n}", _upside_down(tensor[n])) for n in range(tensor.shape[0])]
        if not config.gated_linear_unit:
            return [(f"mlp.linear_fc1.{kind}", tensor)]
        gate = tensors.get(f"{layer}mlp.gate.{kind}")
        if gate is None:
            raise MappingError("the other half of a gated projection is missing", tensor=f"{layer}mlp.gate.{kind}")
        if gate.shape != tensor.shape:
            raise MappingError(
                "halves of a gated projection differ", tensor=full, expected=gate.shape, found=tensor.shape
            )
        return [(f"mlp.linear_fc1.{kind}", concatenate([tensor, gate], 0))]
    if module == "mlp.gate":
        return []
    if name == _SHARED_FC[1]:
        return [(_SHARED_FC[0], _upside_down(tensor))]
    if name == _SHARED_GATE[1]:
        return [(_SHARED_GATE[0], tensor)]
    if module == "mlp.proj" and kind == "weight" and tensor.ndim == 3:
        return [(f"mlp.experts.linear_fc2.weight{n}", tensor[n]) for n in range(tensor.shape[0])]
    outer = f"{layer}post_feedforward_layernorm.weight" in tensors
    for hub, own in (_OUTER_NORMS if outer else _NORMS).items():
        if name.startswith(own):
            sparse = hub == "mlp.linear_fc1.layer_norm_" and f"{layer}mlp.router.weight" in tensors
            return [(("pre_mlp_layernorm." if sparse else hub) + name.removeprefix(own), tensor)]
    for hub, own in _MODULES.items():
        if module == own:
            return [(f"{hub}.{kind}", tensor)]
    return [(name, tensor)]


def _interleaved(name: str, tensor: LazyTensor, config: ModelConfig) -> LazyTensor:
    """Query, key and value rows by group, of rows one kind after the other."""
    shapes = INTERLEAVED_QKV.source_shapes(tensor.shape, config)
    rows = sum(shape[0] for shape in shapes)
    if tensor.shape[0] != rows:
        raise MappingError(
            "its rows are not those of the configuration's heads",
            tensor=name,
            expected=f"{rows} rows",
            found=tensor.shape,
            remedy="give the configuration that belongs to these weights with --config",
        )
    parts, at = [], 0
    for shape in shapes:
        parts.append(tensor.narrow(0, at, shape[0]))
        at += shape[0]
    return INTERLEAVED_QKV.to_hub(parts, config)


def _upside_down(tensor: LazyTensor) -> LazyTensor:
    """The two halves of an expert's first layer in the other order."""
    half = tensor.shape[0] // 2
    return concatenate([tensor.narrow(0, half, tensor.shape[0] - half), tensor.narrow(0, 0, half)], 0)


def _no_place(name: str) -> MappingError:
    return MappingError(
        "TensorRT-LLM's decoders have no such tensor",
        tensor=name,
        remedy="convert to another naming, or to safetensors, torch or dcp, which keep names",
    )
