"""What one rank holds of a training job's state, in neutral words, and the way back into it.

A ``LiveState`` has *pieces*, boxes of tensors that the whole job holds, and *objects*, everything else.  Saving reads
the pieces' tensors; loading fills them in place and hands objects to their ``put``.

Pieces know nothing of meshes or groups.  What several ranks hold alike is said by ``replica``: None if every rank that
has the very box has a copy of it (so it is with tensors of torch, whose mesh may be a part of the ranks), else a
number, of which 0 is the copy that counts: a box without one is a hole, and one with two is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from typing import Any

import torch

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.formats.shared import nesting
from anyckpt.indexing import Shape

Path = tuple[Any, ...]
"""Keys of dictionaries as they are, and positions in lists as ``Index``."""

Put = Callable[[Any], None]

_CHAINED = ("chained_",)
"""How names of several optimizers' states begin in Megatron-Core."""


class Index(int):
    """A position in a list, which a dictionary's key may be equal to and is not."""


@dataclass(frozen=True)
class LivePiece:
    """A box of a tensor that this rank has in memory.

    Attributes:
        name: the tensor's.
        dtype: element type.
        shape: the whole tensor's.
        offset: index of the box's first element in the whole.
        tensor: the elements, with as many axes as the whole; a view of the live tensor, into which loading writes.
        replica: which copy of the box this is, 0 for the one that counts; None if all that have it are alike.
        resizable: a checkpoint in which the tensor has other lengths is loaded as far as both reach, zeros elsewhere
            (a vocabulary that is padded for another number of ranks).
    """

    name: str
    dtype: DType
    shape: Shape
    offset: Shape
    tensor: torch.Tensor
    replica: int | None = None
    resizable: bool = False

    @property
    def sizes(self) -> Shape:
        """Elements of the box along each axis."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def holds(self, start: Shape, shape: Shape) -> bool:
        """Whether a box of the whole lies in this one."""
        return all(
            begin >= own and begin + length <= own + size
            for begin, length, own, size in zip(start, shape, self.offset, self.tensor.shape, strict=True)
        )

    def part(self, start: Shape, shape: Shape) -> torch.Tensor:
        """The elements of a box of the whole that lies in this one."""
        found = self.tensor
        for axis, (begin, length) in enumerate(zip(start, shape, strict=True)):
            if length != found.shape[axis]:
                found = found.narrow(axis, begin - self.offset[axis], length)
        return found


@dataclass(frozen=True)
class LiveObject:
    """What is no tensor.

    Attributes:
        name: its own in the whole checkpoint.
        value: what it is now.
        put: takes what was loaded in its place.
        replica: as of a piece.
        cell: for one of a grid of objects: the grid's name, which cell this is, and how many there are along each axis.
    """

    name: str
    value: Any
    put: Put
    replica: int | None = None
    cell: tuple[str, Shape, Shape] | None = None


@dataclass
class LiveState:
    """What one rank has.

    Attributes:
        pieces: boxes of tensors; a rank may have several of one tensor, and none of some.
        objects: everything else.
        paths: name -> keys that lead to it in the nested state, for formats that keep the nesting.
        finish: called when everything is loaded: what has to be put back as a whole (``load_state_dict``).
        replace_all: called when everything is loaded, with the objects of the checkpoint that all ranks have alike and
            the names that it lacks, by who takes all of these; None if objects are asked for by name.
        owners: keys of what has ``state_dict`` and ``load_state_dict``, each with what ``finish`` calls for it.
        optimizers: keys at the top under which there is an optimizer's state.
        left_out: names that the state has and that nobody wants.
    """

    pieces: list[LivePiece] = field(default_factory=list)
    objects: list[LiveObject] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    finish: list[Callable[[], None]] = field(default_factory=list)
    replace_all: Callable[[Mapping[str, Any], Collection[str]], None] | None = None
    owners: list[str] = field(default_factory=list)
    optimizers: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)

    def is_of_optimizer(self, name: str) -> bool:
        """Whether a name is of an optimizer's state."""
        return is_of_optimizer(name, self.paths, self.optimizers)

    def leave_out_optimizer(self) -> None:
        """Take no part of an optimizer's state."""
        every = (*(piece.name for piece in self.pieces), *(one.name for one in self.objects))
        self.left_out = list(dict.fromkeys(name for name in every if self.is_of_optimizer(name)))
        out = set(self.left_out)
        self.pieces = [piece for piece in self.pieces if piece.name not in out]
        self.objects = [one for one in self.objects if one.name not in out]
        self.paths = {name: path for name, path in self.paths.items() if name not in out}
        kept = [number for number, key in enumerate(self.owners) if key not in self.optimizers]
        self.finish = [self.finish[number] for number in kept]
        self.owners = [self.owners[number] for number in kept]


def is_of_optimizer(name: str, paths: Mapping[str, Path], optimizers: Collection[str]) -> bool:
    """Whether a name is of an optimizer's state.

    Args:
        name: of a tensor or an object.
        paths: name -> keys that lead to it, where it is nested.
        optimizers: keys at the top under which there is an optimizer's state, besides the usual ones.
    """
    path = paths.get(name, (name,))
    root = str(path[0]) if len(path) > 1 else name.partition(".")[0]
    return root in optimizers or root in nesting.OPTIMIZERS or name.startswith(_CHAINED)
