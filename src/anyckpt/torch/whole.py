"""One checkpoint out of what all ranks have, the same on every rank: lazy tensors of which each rank has some bytes.

Of the copies of a box one rank's is written; which, ``shared_out`` decides evenly by bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from anyckpt.containers.dcp.chunks import HeldBox, cut
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.indexing import Shape
from anyckpt.operations.steps.live import Live
from anyckpt.storage.owned import OwnedSource
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import Constant, LazyTensor, Stored
from anyckpt.tensor.nodes import tiled
from anyckpt.torch.integrity import Box, Survey
from anyckpt.torch.live import LivePiece, LiveState

_SPLIT = 32 << 20
"""Bytes above which a box of which several ranks have a copy is divided between them."""

Share = Mapping[str, Sequence[HeldBox]]


class LiveSource(ByteSource):
    """The elements of a live tensor in C order, read where they are; the tensor may be exchanged for one like it.

    Args:
        tensor: of any strides and device.
        name: what to call it in a message.
    """

    __slots__ = ("_address", "_itemsize", "_lazy", "_stride", "shape", "tensor")

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self.name = name
        self.path = None
        self.size = tensor.numel() * tensor.element_size()
        self._itemsize = tensor.element_size()
        self.bind(tensor)

    def bind(self, tensor: torch.Tensor) -> None:
        """Read from this tensor from now on."""
        self.tensor = tensor.resolve_conj().resolve_neg()
        self.shape = tuple(tensor.shape)
        # Where nobody is sure to find the same elements again, there is no place: what is resolved is a copy.
        self._address = tensor.data_ptr() if self.tensor is tensor else None
        self._stride = tensor.stride()
        lazy = Live().tensor(self.tensor)
        assert lazy is not None
        self._lazy = lazy

    def follow(self, tensor: torch.Tensor) -> None:
        """Read from this tensor of the same shape from now on."""
        if tensor.data_ptr() != self._address or tensor.stride() != self._stride:
            self.bind(tensor)

    def identity(self) -> None:
        """None: it is live state."""
        return

    @property
    def is_live(self) -> bool:
        return True

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        out = np.frombuffer(buffer, dtype=self._lazy.dtype.raw)
        self._lazy.read_flat(offset // self._itemsize, out)


@dataclass(frozen=True)
class Whole:
    """What all ranks write together.

    Attributes:
        tensors: every tensor of the job, of which this rank has some of the bytes.
        boxes: of each tensor, which rank writes what of it.
        sources: the live tensors that this rank writes, by tensor's name and first index of the box.
    """

    tensors: dict[str, LazyTensor]
    boxes: dict[str, tuple[HeldBox, ...]]
    sources: dict[tuple[str, Shape], LiveSource]


def shared_out(
    survey: Survey,
    *,
    parallel: bool = True,
    together: Sequence[frozenset[int]] = (),
    alone: Callable[[str], bool] | None = None,
) -> Share:
    """Which rank writes which boxes: of several that have a copy, the one that has least to write so far.

    Args:
        survey: what all ranks have.
        parallel: False for the rank whose copy counts, and nobody else.
        together: groups of ranks that share the writing of their copies; all ranks if there are none.
        alone: says of a tensor's name that of its copies the one that counts is written, whatever ``parallel`` says.
    """
    load: dict[int, int] = {}
    taken: dict[str, list[HeldBox]] = {name: [] for name in survey.tensors}
    shared: list[tuple[int, str, HeldBox, tuple[int, ...]]] = []
    for name, (dtype, _, boxes) in survey.tensors.items():
        is_shared = parallel and (alone is None or not alone(name))
        for box in boxes:
            ranks = _candidates(box, is_shared, together)
            if len(ranks) == 1:
                load[ranks[0]] = load.get(ranks[0], 0) + math.prod(box.sizes) * dtype.itemsize
                taken[name].append(HeldBox(box.offset, box.sizes, ranks[0]))
                continue
            for start, shape in _divided(box, dtype):
                nbytes = math.prod(shape) * dtype.itemsize
                shared.append((nbytes, name, HeldBox(start, shape, ranks[0]), ranks))
    for nbytes, name, held, ranks in sorted(shared, key=lambda one: -one[0]):
        rank = min(ranks, key=lambda one: (load.get(one, 0), one))
        load[rank] = load.get(rank, 0) + nbytes
        taken[name].append(HeldBox(held.start, held.shape, rank))
    return {name: sorted(boxes, key=lambda held: held.start) for name, boxes in taken.items()}


def _candidates(box: Box, parallel: bool, together: Sequence[frozenset[int]]) -> tuple[int, ...]:
    if not parallel:
        return box.ranks[:1]
    group = next((one for one in together if box.ranks[0] in one), None)
    return box.ranks if group is None else tuple(rank for rank in box.ranks if rank in group)


def _divided(box: Box, dtype: DType) -> Iterator[tuple[Shape, Shape]]:
    for start, shape in cut(box.sizes, dtype.itemsize, limit=_SPLIT):
        yield tuple(a + b for a, b in zip(box.offset, start, strict=True)), shape


def whole_of(survey: Survey, share: Share, live: LiveState, rank: int, key: str) -> Whole:
    """The tensors of all ranks together.

    Args:
        survey: what all have.
        share: who writes what.
        live: what this rank has.
        rank: its number.
        key: names this save, and no other.
    """
    mine: dict[str, list[LivePiece]] = {}
    for piece in live.pieces:
        mine.setdefault(piece.name, []).append(piece)
    tensors: dict[str, LazyTensor] = {}
    boxes: dict[str, tuple[HeldBox, ...]] = {}
    sources: dict[tuple[str, Shape], LiveSource] = {}
    for name, (dtype, shape, _) in survey.tensors.items():
        tiles: list[LazyTensor] = []
        for held in share[name]:
            source = None
            nbytes = math.prod(held.shape) * dtype.itemsize
            if held.rank == rank and nbytes:
                piece = next(one for one in mine[name] if one.holds(held.start, held.shape))
                source = LiveSource(piece.part(held.start, held.shape), name)
                sources[name, held.start] = source
            if not nbytes:
                tiles.append(Constant(dtype, held.shape))
                continue
            owned = OwnedSource(held.rank + 1, (key, name, held.start), nbytes, source, name)
            tiles.append(Stored(owned, 0, dtype, held.shape))
        stops = [tuple(a + n for a, n in zip(held.start, held.shape, strict=True)) for held in share[name]]
        tensors[name] = tiled(dtype, shape, [held.start for held in share[name]], stops, tiles)
        boxes[name] = tuple(share[name])
    return Whole(tensors, boxes, sources)
