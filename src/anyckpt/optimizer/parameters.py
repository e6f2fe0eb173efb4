"""Which of a model's tensors an optimizer trains, in which order, and matching them with what has no names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import storage_key
from anyckpt.indexing import Shape
from anyckpt.optimizer.state import unproved
from anyckpt.tensor import LazyTensor

_BUFFERS = re.compile(
    r"(?:.*\.)?(?:running_mean|running_var|num_batches_tracked|inv_freq|expert_bias|e_score_correction_bias"
    r"|local_tokens_per_expert|_extra_state|position_ids|masked_bias)"
)
"""Last parts of names of buffers: batch norm's, rotary frequencies, the MoE router's load balance."""


def buffers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """What can be no parameter."""
    return {name: tensor for name, tensor in tensors.items() if _is_buffer(name, tensor)}


def _is_buffer(name: str, tensor: LazyTensor) -> bool:
    return not tensor.dtype.is_floating or _BUFFERS.fullmatch(name) is not None


def trained(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """What can be a parameter, in the model's order: no buffers, no integers, a shared tensor under its first name."""
    found: dict[str, LazyTensor] = {}
    seen: set[Any] = set()
    for name, tensor in tensors.items():
        if _is_buffer(name, tensor):
            continue
        key = storage_key(tensor)
        if key is not None and key in seen:
            continue
        seen.add(key)
        found[name] = tensor
    return found


def aligned(
    entries: Sequence[Shape | None], candidates: Mapping[str, LazyTensor], what: str, path: str | None
) -> list[str]:
    """The name of each entry: candidates in order, some of them left out if only one choice fits the shapes.

    Args:
        entries: shape of each entry, None where it has no state.
        candidates: parameters that they may be, in the model's order.
        what: the entries, for messages.
        path: file, for messages.

    Raises:
        MappingError: no choice fits, or several do.
    """
    names = list(candidates)
    shapes = [candidates[name].shape for name in names]
    if len(entries) > len(names):
        raise unproved(
            f"{what} has more entries than the model has such parameters",
            path=path,
            expected=f"at most {len(names)}",
            found=len(entries),
        )
    first = _leftmost(entries, shapes)
    if first is None:
        number, name = _misfit(entries, names, shapes)
        raise unproved(
            f"{what} does not fit the model's parameters: {len(entries)} entries, {len(names)} parameters",
            path=path,
            tensor=name,
            expected=candidates[name].shape,
            found=f"{entries[number]} in entry {number}",
        )
    back = _leftmost(list(reversed(entries)), list(reversed(shapes)))
    assert back is not None
    if first != [len(names) - 1 - index for index in reversed(back)]:
        raise unproved(
            f"{what} has fewer entries than the model has such parameters, and more than one choice fits their shapes",
            path=path,
            expected=f"{len(names)}, or shapes that tell which are frozen",
            found=len(entries),
        )
    return [names[index] for index in first]


def _leftmost(entries: Sequence[Shape | None], shapes: Sequence[Shape]) -> list[int] | None:
    """The first candidates, in order, that fit the entries; from the other side it gives the last ones."""
    chosen: list[int] = []
    at = 0
    for entry in entries:
        while at < len(shapes) and entry is not None and shapes[at] != entry:
            at += 1
        if at == len(shapes):
            return None
        chosen.append(at)
        at += 1
    return chosen


def _misfit(entries: Sequence[Shape | None], names: Sequence[str], shapes: Sequence[Shape]) -> tuple[int, str]:
    """Number of the first entry whose shape is not that of the parameter in its place, and that parameter's name."""
    pairs = enumerate(zip(entries, shapes, strict=False))
    number = next((number for number, (entry, shape) in pairs if entry is not None and entry != shape), 0)
    return number, names[number]
