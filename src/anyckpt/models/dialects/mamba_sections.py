"""Mamba-2 mixers and gated delta nets in distributed checkpoints, which save the sections of their projections apart.

Megatron-Core 0.16 writes ``mixer.in_proj.weight.{z,x,B,C,dt}`` and ``mixer.conv1d.{weight,bias}.{x,B,C}``; its main
branch names the convolution's parameters ``conv1d_weight`` and ``conv1d_bias``.  Of a gated delta net the sections are
``self_attention.in_proj.weight.{query,key,value,z,beta,alpha}`` and ``self_attention.conv1d.weight.{query,key,value}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from anyckpt.config.hub_names import FINAL_NORM, FINAL_NORM_OF_HYBRIDS
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, concatenate

_FUSED = re.compile(
    r"(.+\.(?:mixer|self_attention))\.(?:(in_proj)\.|(conv1d)[._])(weight|bias)"
    r"(?:\.(z|x|B|C|dt|query|key|value|beta|alpha))?"
)
_SECTIONS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
"""Rows of a mixer's projections, in order."""
_OF_DELTA = {"in_proj": ("query", "key", "value", "z", "beta", "alpha"), "conv1d": ("query", "key", "value")}
"""Rows of a gated delta net's."""


def has_mixers(names: Iterable[str]) -> bool:
    """Whether any of the hub's names is a mixer's or a gated delta net's."""
    return any(_FUSED.fullmatch(name) for name in names)


def _sections(module: str, projection: str) -> tuple[str, ...]:
    return (_SECTIONS if module.endswith(".mixer") else _OF_DELTA)[projection]


def joined_mixers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Projections whole, under the names of Megatron-Core 0.16; and the name of the stack's last norm.

    Raises:
        MappingError: a section is missing, or is there twice.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        mixer, module = match[1], match[2] or match[3]
        key = f"{mixer}.{module}.{match[4]}"
        whole, first = tensor, None
        if match[5] is not None:
            stem = name[: -len(match[5])]
            sections = _sections(mixer, module)
            first = stem + sections[0]
            missing = [stem + part for part in sections if stem + part not in tensors]
            if missing:
                raise MappingError("a section of a mixer's projection is missing", tensor=missing[0])
            whole = concatenate([tensors[stem + part] for part in sections], 0)
        if first in (None, name):
            if key in result:
                raise MappingError("two stored tensors are the same one of the model", tensor=name, found=key)
            result[key] = whole
    if (
        any(".mixer.in_proj." in name for name in result) and FINAL_NORM in result
    ):  # as Megatron-Bridge's main branch names it
        result.setdefault(FINAL_NORM_OF_HYBRIDS, result[FINAL_NORM])
        del result[FINAL_NORM]
    return result


def separate_mixers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Projections in sections, whose lengths follow from the shapes of one mixer's tensors.

    Raises:
        MappingError: they do not.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None or match[5] is not None:
            result[name] = tensor
            continue
        rows, start = _section_rows(match[1], tensors), 0
        for section in _sections(match[1], match[2] or match[3]):
            result[f"{name}.{section}"] = tensor.narrow(0, start, rows[section])
            start += rows[section]
    return result


def _section_rows(mixer: str, tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    parts = [tensors.get(f"{mixer}.{name}") for name in ("A_log", "in_proj.weight", "conv1d.weight")]
    lengths = [part.shape[0] for part in parts if part is not None and part.ndim]
    if len(lengths) == len(parts):
        heads, projected, convolved = lengths
        if not mixer.endswith(".mixer"):
            values = projected - convolved - 2 * heads
            keys, odd = divmod(convolved - values, 2)
            if values > 0 and keys > 0 and not odd:
                return {**dict.fromkeys(("query", "key"), keys), **dict.fromkeys(("value", "z"), values),
                        **dict.fromkeys(("beta", "alpha"), heads)}  # fmt: skip
            raise _unclear(mixer, lengths)
        inner = projected - heads - convolved
        states, odd = divmod(convolved - inner, 2)
        if inner > 0 and states > 0 and not odd:
            return {"z": inner, "x": inner, "B": states, "C": states, "dt": heads}
    raise _unclear(mixer, lengths)


def _unclear(mixer: str, lengths: list[int]) -> MappingError:
    projections = ", ".join(f"{name} of {', '.join(_sections(mixer, name))}" for name in _SECTIONS)
    return MappingError(
        "the sections of its rows do not follow from the shapes of its module's tensors",
        tensor=f"{mixer}.in_proj.weight",
        expected=f"A_log of heads, {projections}",
        found=lengths,
    )
