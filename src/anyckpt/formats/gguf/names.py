"""Tensors of a GGUF file as Hugging Face has them, and back: names, rows of queries and keys, norms, experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.formats.gguf.architectures import OUTER, Architecture
from anyckpt.formats.gguf.config import experts_of
from anyckpt.formats.gguf.paired_experts import JOINED, apart, joined
from anyckpt.identity import ElementWise
from anyckpt.indexing import Array
from anyckpt.tensor import LazyTensor, Mapped, stack

Tensors = dict[str, LazyTensor]

ROPE = "rope_freqs.weight"
"""Divisors of frequencies, which the hub's configuration says (``rope_type`` llama3)."""

_STORED = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)", re.ASCII)
_HUB_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)", re.ASCII)
_GATE_OF_SHARED = "mlp.shared_expert_gate"
_OUTPUT = "output.weight"
_WITHOUT_ENDING = ".sinks"


@dataclass(frozen=True)
class Shifted(ElementWise):
    """Numbers and one that is added, in float32."""

    by: float

    def __call__(self, array: Array) -> Array:
        moved: Array = array.astype(np.float32, copy=False) + np.float32(self.by)
        return moved


def to_hub(tensors: Mapping[str, LazyTensor], known: Architecture, config: Mapping[str, Any], path: str) -> Tensors:
    """Every tensor under its name at the hub, as it is there.

    Args:
        tensors: as stored, in numbers.
        known: the architecture.
        config: the hub's, with numbers of heads and experts.
        path: of the file.

    Raises:
        MappingError: a name is not one of this architecture's, or a shape is not possible.
    """
    if known.pairs_of_experts:
        tensors = joined(tensors, path)
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name in OUTER:
            found[OUTER[name]] = _normed(OUTER[name], tensor, known, -1.0)
            continue
        match = _STORED.fullmatch(name)
        stem = match[2] if match else ""
        paired = known.pairs_of_experts and stem in JOINED
        if match is None or not (stem in known.layer or stem in known.experts or paired):
            raise MappingError(
                f"is not one of the tensors of {known.name}",
                path=path,
                tensor=name,
                remedy="tell the project of the model, so that it can be added",
            )
        prefix, ending = f"model.layers.{match[1]}.", match[3]
        if paired:
            _check_experts(tensor, config.get(known.expert_count), path, name)
            found[f"{prefix}{JOINED[stem]}{'_bias' if ending == 'bias' else ''}"] = tensor
            continue
        if stem in known.experts:
            _check_experts(tensor, config.get(known.expert_count), path, name)
            for number in range(tensor.shape[0]):
                found[f"{prefix}{known.experts[stem].format(number)}.{ending}"] = tensor[number]
            continue
        own = known.layer[stem]
        if own == _GATE_OF_SHARED and tensor.ndim == 1:
            tensor = tensor.reshape((1, -1))
        heads = _heads(stem, known, config)
        if heads:
            tensor = _halved(tensor, heads, path, name)
        if own.endswith(_WITHOUT_ENDING):
            found[prefix + own] = tensor
            continue
        found[f"{prefix}{own}.{ending}"] = _normed(f"{own}.{ending}", tensor, known, -1.0)
    return found


def from_hub(
    weights: Mapping[str, LazyTensor], known: Architecture, config: Mapping[str, Any], path: str
) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor under its name in the file, in the order of the hub's; experts together.

    Raises:
        MappingError: a name is not one of this architecture's, or experts are missing.
    """
    outer = {own: name for name, own in OUTER.items() if not (known.tied and name == _OUTPUT)}
    layer = {own: stem for stem, own in known.layer.items()}
    experts = {own: stem for stem, own in known.experts.items()}
    if known.pairs_of_experts:
        weights = apart(weights)
    gathered: dict[str, Tensors] = {}
    count = experts_of(config, known, path) if known.experts else None
    for name, tensor in weights.items():
        if name in outer:
            yield outer[name], _normed(name, tensor, known, 1.0)
            continue
        if known.pairs_of_experts and _STORED.fullmatch(name):
            yield name, tensor
            continue
        match = _HUB_LAYER.fullmatch(name if not name.endswith(_WITHOUT_ENDING) else f"{name}.weight")
        own = match[2] if match else ""
        number = _EXPERT.search(own)
        pattern = _EXPERT.sub("{}", own)
        if match is not None and own in layer:
            heads = _heads(layer[own], known, config)
            tensor = _interleaved(tensor, heads, path, name) if heads else tensor
            if own == _GATE_OF_SHARED and tensor.shape[0] == 1:
                tensor = tensor.reshape(tensor.shape[1:])
            yield f"blk.{match[1]}.{layer[own]}.{match[3]}", _normed(name, tensor, known, 1.0)
        elif match is not None and number is not None and pattern in experts:
            stored = f"blk.{match[1]}.{experts[pattern]}.{match[3]}"
            some = gathered.setdefault(stored, {})
            some[number[0]] = tensor
            if len(some) == count:
                yield stored, _stacked(gathered.pop(stored), stored, path)
        else:
            raise MappingError(
                f"llama.cpp's {known.name} has no such tensor",
                path=path,
                tensor=name,
                remedy="leave it out with --exclude, if the model runs without it",
            )
    for stored, some in gathered.items():
        raise MappingError(
            "some of its experts are missing", path=path, tensor=stored, expected=count, found=f"{len(some)} experts"
        )


def _stacked(some: Tensors, name: str, path: str) -> LazyTensor:
    try:
        return stack([some[str(number)] for number in range(len(some))])
    except KeyError as error:
        raise MappingError("some of its experts are missing", path=path, tensor=name, found=f"none {error}") from error


def _check_experts(tensor: LazyTensor, count: Any, path: str, name: str) -> None:
    if tensor.ndim < 2 or tensor.shape[0] != count:
        raise MappingError(
            "does not hold as many experts as the metadata says",
            path=path,
            tensor=name,
            expected=count,
            found=f"shape {list(tensor.shape)}",
        )


def _heads(stem: str, known: Architecture, config: Mapping[str, Any]) -> int:
    """Of the queries or keys whose rows are in ggml's order; 0 of everything else."""
    if not known.interleaved or stem not in ("attn_q", "attn_k"):
        return 0
    queries = config.get("num_attention_heads")
    heads = queries if stem == "attn_q" else config.get("num_key_value_heads", queries)
    return heads if isinstance(heads, int) else 0


def _halved(tensor: LazyTensor, heads: int, path: str, name: str) -> LazyTensor:
    """Rows of heads whose rotary pairs are neighbours, as halves."""
    return _regrouped(tensor, heads, 2, path, name)


def _interleaved(tensor: LazyTensor, heads: int, path: str, name: str) -> LazyTensor:
    """Rows of heads whose rotary pairs are halves apart, as neighbours."""
    return _regrouped(tensor, heads, tensor.shape[0] // heads // 2, path, name)


def _regrouped(tensor: LazyTensor, heads: int, inner: int, path: str, name: str) -> LazyTensor:
    rows, rest = tensor.shape[0], tensor.shape[1:]
    if heads < 1 or rows % (2 * heads):
        raise MappingError("has rows that heads do not divide", path=path, tensor=name, expected=heads, found=rows)
    grouped = tensor.reshape((heads, rows // heads // inner, inner, *rest))
    return grouped.permute((0, 2, 1, *range(3, 3 + len(rest)))).reshape(tensor.shape)


def _normed(name: str, tensor: LazyTensor, known: Architecture, by: float) -> LazyTensor:
    if not known.unit_norms or not name.endswith("norm.weight"):
        return tensor
    return Mapped((tensor.cast("float32"),), dtype("float32"), Shifted(by))
