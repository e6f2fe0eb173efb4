"""Which weights of a Hugging Face model are quantized: the matrices of linear modules in its layers.

Names tell, because a checkpoint has no modules.  What is left out is what NVIDIA ModelOpt 0.40 leaves out
(``lm_head``, routers, gates of shared experts, output layers), embeddings, and what else than language a model reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from anyckpt.data_classes import dataclass
from anyckpt.tensor import LazyTensor

NEVER = {
    "*lm_head*": "the output layer",
    "*output_layer*": "the output layer",
    "*proj_out*": "the output layer",
    "*embed_out*": "the output layer",
    "*shared_head*": "the output layer",
    "*eh_proj": "of the prediction of a further token",
    "*router*": "a router",
    "*.gate": "a router",
    "*shared_expert_gate*": "a gate",
    "*embed*": "an embedding",
    "*relative_attention_bias*": "an embedding",
    "*norm*": "a normalization",
    "*conv1d*": "a convolution",
    "*vision*": "not of the language model",
    "*visual*": "not of the language model",
    "*audio*": "not of the language model",
    "*multi_modal_projector*": "not of the language model",
}
"""Globs of modules -> what they are."""

ASKED = "--quantize-exclude"
_LAYER = re.compile(r"\.\d+\.")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Choice:
    """What is quantized.

    Attributes:
        weights: names of those that are.
        spared: modules with a matrix that are not -> reason.
    """

    weights: tuple[str, ...]
    spared: dict[str, str]


def choose_linear(tensors: Mapping[str, LazyTensor], exclude: Sequence[str] = ()) -> Choice:
    """The matrices of linear modules in numbered layers.

    Args:
        tensors: under Hugging Face's names.
        exclude: globs of further modules to leave as they are.
    """
    weights: list[str] = []
    spared: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "float" or tensor.dtype.itemsize < 2 or tensor.ndim < 2:
            continue
        module = name.removesuffix(_WEIGHT)
        reason = _reason(name, module, tensor, exclude)
        if reason is None:
            weights.append(name)
        else:
            spared[module] = reason
    return Choice(tuple(weights), spared)


def choose_experts(tensors: Mapping[str, LazyTensor], exclude: Sequence[str] = ()) -> Choice:
    """Experts that lie in one tensor, ``[experts, inputs, outputs]``, as those of GPT-OSS do.

    Args:
        tensors: under Hugging Face's names.
        exclude: globs of modules to leave as they are.
    """
    weights: list[str] = []
    spared: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "float" or tensor.dtype.itemsize < 2 or tensor.ndim < 2:
            continue
        if tensor.ndim == 3 and name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            if is_asked(name, name, exclude):
                spared[name] = ASKED
            else:
                weights.append(name)
        elif name.endswith(_WEIGHT):
            spared[name.removesuffix(_WEIGHT)] = "no stacked experts"
    return Choice(tuple(weights), spared)


def _reason(name: str, module: str, tensor: LazyTensor, exclude: Sequence[str]) -> str | None:
    """Why a tensor is not quantized."""
    if is_asked(name, module, exclude):
        return ASKED
    for pattern, what in NEVER.items():
        if fnmatchcase(module, pattern):
            return what
    if not _LAYER.search(f".{name}"):
        return "outside the layers"
    if tensor.ndim > 2 or not name.endswith(_WEIGHT):
        return "no matrix of a linear module"
    return None


def is_asked(name: str, module: str, exclude: Sequence[str]) -> bool:
    """Whether any of the globs matches a tensor's name or that of its module."""
    return any(fnmatchcase(text, pattern) for pattern in exclude for text in (name, module))
