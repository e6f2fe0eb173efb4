"""The spellings of experts, and which expert is on which rank.

Expert ``e`` of ``E`` is on expert rank ``e // (E / ranks)``; a rank numbers its own from 0.  The hub's spelling is that
of Transformer Engine's grouped linear layers with the global index: ``mlp.experts.linear_fc1.weight7``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, stack

Spelling = Literal["grouped", "sequential", "legacy-grouped"]
"""``grouped``: ``experts.linear_fc1.weight3`` (TEGroupedMLP); ``sequential``:
``experts.local_experts.3.linear_fc1.weight`` (SequentialMLP); ``legacy-grouped``: ``experts.weight1`` of all of a
rank's experts (GroupedMLP)."""


class Expert(NamedTuple):
    """An expert's parameter: its name without the index (``...experts.linear_fc1.weight``), and which expert it is."""

    base: str
    number: int


def parse(name: str) -> Expert | None:
    """The expert of a grouped or sequential name, None for any other name."""
    if ".experts." not in name:
        return None
    found = _SEQUENTIAL.fullmatch(name)
    if found:
        return Expert(f"{found[1]}.{found[3]}", int(found[2]))
    found = _GROUPED.fullmatch(name)
    return Expert(found[1], int(found[2])) if found else None


def split_legacy(tensors: Mapping[str, LazyTensor], count: int | None, source: str) -> dict[str, LazyTensor]:
    """Tensors of a rank with GroupedMLP's ``weight1`` and ``weight2`` taken apart into the experts'.

    GroupedMLP sees ``weight1`` ``[hidden, experts * rows]`` as ``[experts, hidden, rows]`` in memory, and ``weight2``
    ``[experts * columns, hidden]`` as ``[experts, columns, hidden]``; both are [in, out], transposed here.

    Args:
        tensors: by name.
        count: experts of the rank, None if the model is dense.
        source: file, for messages.

    Raises:
        MappingError: the tensor does not hold so many experts.
    """
    if not any(_LEGACY.fullmatch(name) for name in tensors if name.endswith((".weight1", ".weight2"))):
        return dict(tensors)
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _LEGACY.fullmatch(name)
        if found is None:
            result[name] = tensor
            continue
        axis = 1 if found[2] == "1" else 0
        if tensor.ndim != 2 or not count or tensor.shape[axis] % count:
            raise MappingError(
                "does not hold the experts of a rank",
                path=source,
                tensor=name,
                expected=f"an axis {axis} of {count or 0} experts",
                found=tensor.shape,
            )
        each = tensor.shape[axis] // count
        shape = (tensor.shape[0], each) if axis == 1 else (each, tensor.shape[1])
        apart = tensor.reshape((count, *shape))
        for index in range(count):
            one = apart.narrow(0, index, 1).reshape(shape).permute((1, 0))
            result[f"{found[1]}.linear_fc{found[2]}.weight{index}"] = one
    return result


def spelled(groups: Mapping[str, Sequence[LazyTensor]], spelling: Spelling) -> Iterator[tuple[str, LazyTensor]]:
    """Names and tensors of one module's experts on one rank.

    Args:
        groups: name without index -> the rank's experts in order.
        spelling: how to name them.

    Raises:
        MappingError: legacy-grouped experts have no biases and no adapters.
    """
    if spelling == "grouped":
        for base, tensors in groups.items():
            for index, tensor in enumerate(tensors):
                yield f"{base}{index}", tensor
    elif spelling == "sequential":
        for index in range(max(map(len, groups.values()))):
            for base, tensors in groups.items():
                module, _, rest = base.rpartition(".experts.")
                yield f"{module}.experts.local_experts.{index}.{rest}", tensors[index]
    else:
        for base, tensors in groups.items():
            module, _, rest = base.rpartition(".experts.")
            which = {"linear_fc1.weight": "1", "linear_fc2.weight": "2"}.get(rest)
            if which is None:
                raise MappingError("cannot be written as a legacy grouped expert, which has weights only", tensor=base)
            together = stack([tensor.permute((1, 0)) for tensor in tensors])
            count, rows, columns = together.shape
            shape = (rows, count * columns) if which == "1" else (count * rows, columns)
            yield f"{module}.experts.weight{which}", together.reshape(shape)


_SEQUENTIAL = re.compile(r"(.*\.experts)\.local_experts\.(\d{1,7})\.(.+)")
_GROUPED = re.compile(r"(.*\.experts\.(?:[^.]+\.)*(?:weight|bias))(\d{1,7})")
_LEGACY = re.compile(r"(.*\.experts)\.weight([12])")
