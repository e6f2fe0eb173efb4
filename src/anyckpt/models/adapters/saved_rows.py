"""Rows of an adapter's second factor where a distributed checkpoint keeps them in another order, or apart.

NeMo 2.5 and Megatron-Bridge 0.4 save every ``linear_out`` of a ``linear_fc1`` as if a rank's rows were half gate and
half up.  That is so for the fused form of a gated MLP; where it is not (the canonical ``adapter_gate`` and
``adapter_up``, and NeMo 2's MLPs without a gate), the saved tensor has all first halves of the ranks' rows before all
second halves.  The chunks that the checkpoint consists of show it: twice as many along the rows as ranks divide
``linear_in``.  Megatron-Bridge's main branch saves ``linear_out`` of Mamba's ``in_proj`` in sections.  Source:
``peft/utils.py`` of both; the order of rows was seen in what Megatron-Core 0.16 saves of such sharded tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, concatenate

SECTIONS = ("z", "x", "B", "C", "dt")
_SECTION = re.compile(rf"(.+\.adapter\.linear_out\.weight)\.({'|'.join(SECTIONS)})")
_CANONICAL = re.compile(r".+\.linear_fc1\.adapter\.adapter_(?:gate|up)\.linear_out\.weight")
_FUSED = re.compile(r".+\.linear_fc1\.adapter\.linear_out\.weight")


def in_true_order(tensors: Mapping[str, LazyTensor], gated: bool | None) -> dict[str, LazyTensor]:
    """The tensors with rows as the weights have them, under whole names.

    Args:
        tensors: by stored name, layers stacked or not.
        gated: whether the model's MLP is gated, None if that is not known.

    Raises:
        MappingError: a section is missing.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        section = _SECTION.fullmatch(name)
        if section is not None:
            if section[1] not in result:
                result[section[1]] = _joined(section[1], tensors)
        elif _CANONICAL.fullmatch(name) or (gated is False and _FUSED.fullmatch(name)):
            result[name] = _by_rank(tensor, tensors.get(name.replace(".linear_out.", ".linear_in.")))
        else:
            result[name] = tensor
    return result


def _joined(stem: str, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    names = [f"{stem}.{section}" for section in SECTIONS]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise MappingError("a section of a mixer's adapter is missing", tensor=missing[0])
    parts = [tensors[name] for name in names]
    return concatenate(parts, max(0, parts[0].ndim - 2))


def _by_rank(up: LazyTensor, down: LazyTensor | None) -> LazyTensor:
    """Every rank's first and second half together, if the chunks show that they were saved apart."""
    ranks = 1 if down is None else _cuts(down)
    if up.ndim < 2 or ranks < 2 or _cuts(up) != 2 * ranks or up.shape[-2] % (2 * ranks):
        return up
    axis, half = up.ndim - 2, up.shape[-2] // 2
    rows = half // ranks
    halves = ((rank * rows, half + rank * rows) for rank in range(ranks))
    return concatenate([up.narrow(axis, start, rows) for pair in halves for start in pair], axis)


def _cuts(tensor: LazyTensor) -> int:
    """Into how many parts the last axis but one is divided."""
    starts = getattr(tensor, "starts", None)
    return 1 if starts is None or tensor.ndim < 2 else len(set(starts[:, -2].tolist()))
