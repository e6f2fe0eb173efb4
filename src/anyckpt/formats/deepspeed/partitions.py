"""Parameters in the flat partitions of ZeRO's ranks.

Stages 1 and 2 flatten each group of parameters, one after another, and cut the whole over the ranks; padding follows
the last parameter, and in some releases each one (``param_alignment_paddings``).  Stage 3 cuts every parameter over the
ranks, padded to a multiple of them, and each rank lays its pieces one after another, in sub-groups.

Facts: ``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``bf16_optimizer.py`` and ``utils/zero_to_fp32.py`` of DeepSpeed
0.5 to 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.formats.shared.one_save import apart
from anyckpt.indexing import Shape
from anyckpt.pickling import Record
from anyckpt.tensor import Constant, LazyTensor, concatenate

Groups = Sequence[Mapping[str, Shape]]
Vectors = Sequence[Sequence[LazyTensor]]
"""Of each rank, the flat vector of each group."""


@dataclass(frozen=True)
class Run:
    """Elements of one rank's vector: ``[start, start + length)`` of the group's."""

    rank: int
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies.

    Attributes:
        shapes: of the parameters, in the order in which they lie.
        runs: of each parameter, the runs that make it up, in order.
        group_of: of each parameter, the index of its group.
    """

    shapes: Mapping[str, Shape]
    runs: Mapping[str, tuple[Run, ...]]
    group_of: Mapping[str, int]

    def tensors(self, vectors: Vectors) -> dict[str, LazyTensor]:
        """The parameters that vectors of this layout hold."""
        found: dict[str, LazyTensor] = {}
        for name, runs in self.runs.items():
            shape = self.shapes[name]
            if not math.prod(shape):
                found[name] = Constant(vectors[0][self.group_of[name]].dtype, shape)
                continue
            pieces = [vectors[run.rank][run.group].narrow(0, run.start, run.length) for run in runs]
            found[name] = concatenate(pieces, 0).reshape(shape)
        return found


def divided_groups(groups: Groups, vectors: Vectors, paddings: Sequence[Sequence[int]] | None, path: str) -> Layout:
    """The layout of stages 1 and 2.

    Args:
        groups: shapes of the parameters of each group, in their order.
        vectors: float32 weights.
        paddings: elements after each parameter of each group, or None for none.
        path: for messages.

    Raises:
        FormatError: the vectors are of other lengths than the parameters need.
    """
    _check_counts(groups, vectors, path)
    shapes: dict[str, Shape] = {}
    runs: dict[str, tuple[Run, ...]] = {}
    group_of: dict[str, int] = {}
    for number, group in enumerate(groups):
        lengths = [own[number].size for own in vectors]
        if any(length != lengths[0] for length in lengths[1:-1]) or lengths[-1] > lengths[0]:
            raise apart(
                f"the ranks' partitions of parameter group {number} are not of one save",
                path=path,
                expected=f"{lengths[0]} elements each, and at most that many in the last",
                found=lengths[:8],
            )
        if paddings is not None and (number >= len(paddings) or len(paddings[number]) != len(group)):
            raise apart(f"does not pad each parameter of group {number}", path=path)
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            shapes[name], group_of[name] = shape, number
            runs[name] = tuple(_cut(number, lengths, offset, math.prod(shape)))
            offset += math.prod(shape) + (0 if paddings is None else paddings[number][index])
        held, step = sum(lengths), 2 * len(vectors)
        if -(-offset // step) != -(-held // step):
            raise apart(
                f"the ranks' partitions do not hold parameter group {number}",
                path=path,
                expected=f"{offset} elements and less than {step} of padding",
                found=f"{held} elements",
            )
    return Layout(shapes, runs, group_of)


def _cut(group: int, lengths: Sequence[int], offset: int, count: int) -> Iterator[Run]:
    """The runs of ``count`` elements from ``offset`` on in the ranks' vectors, one after another."""
    at = 0
    for rank, length in enumerate(lengths):
        first, last = max(offset, at), min(offset + count, at + length)
        if first < last:
            yield Run(rank, group, first - at, last - first)
        at += length


def divided_parameters(groups: Groups, vectors: Vectors, path: str) -> Layout:
    """The layout of stage 3.

    Raises:
        FormatError: the vectors are of other lengths than the parameters need.
    """
    lengths = [[vector.size for vector in own] for own in vectors]
    if any(own != lengths[0] for own in lengths):
        raise apart(
            "the ranks' partitions are not of one save",
            path=path,
            expected=f"{lengths[0][:8]} elements in each",
            found=next(own[:8] for own in lengths if own != lengths[0]),
        )
    bounds = [0]
    for length in lengths[0]:
        bounds.append(bounds[-1] + length)
    shapes: dict[str, Shape] = {}
    runs: dict[str, tuple[Run, ...]] = {}
    group_of: dict[str, int] = {}
    offset, world = 0, len(vectors)
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        count = math.prod(shape)
        share = -(-count // world)
        shapes[name] = shape
        runs[name] = tuple(
            run
            for rank in range(world)
            for run in _within(rank, bounds, offset, max(0, min(share, count - rank * share)))
        )
        group_of[name] = next((run.group for run in runs[name]), 0)
        offset += share
    if offset != bounds[-1]:
        raise apart(
            "the ranks' partitions do not hold the parameters",
            path=path,
            expected=f"{offset} elements on each of {world} ranks",
            found=f"{bounds[-1]} elements",
        )
    return Layout(shapes, runs, group_of)


def _within(rank: int, bounds: Sequence[int], offset: int, count: int) -> Iterator[Run]:
    """The runs of a rank's elements in its sub-groups, which a piece may lie across."""
    for group, (first, last) in enumerate(pairwise(bounds)):
        start, stop = max(offset, first), min(offset + count, last)
        if start < stop:
            yield Run(rank, group, start - first, stop - start)


def _check_counts(groups: Groups, vectors: Vectors, path: str) -> None:
    for rank, own in enumerate(vectors):
        if len(own) != len(groups):
            raise apart(
                f"rank {rank} has not one partition for each parameter group",
                path=path,
                expected=len(groups),
                found=len(own),
            )


def check_slices(layout: Layout, mappings: Sequence[Any], path: str) -> None:
    """Compare a layout with what ranks say of where their pieces lie (``param_slice_mappings``), if they do.

    Raises:
        FormatError: they say otherwise.
    """
    for rank, mapping in enumerate(mappings):
        stated: dict[str, tuple[Any, Any]] = {}
        for group in mapping if isinstance(mapping, (list, tuple)) else ():
            for name, address in group.items() if isinstance(group, dict) else ():
                if isinstance(address, Record):
                    stated[str(name)] = (address.get("start"), address.get("numel"))
        for name, (start, length) in stated.items():
            own = [(run.start, run.length) for run in layout.runs.get(name, ()) if run.rank == rank]
            if length and own != [(start, length)]:
                raise apart(
                    f"rank {rank} says that its piece lies elsewhere than the parameters' order puts it",
                    path=path,
                    tensor=name,
                    expected=f"{length} elements from {brief(start)} on",
                    found=own or "none",
                )
