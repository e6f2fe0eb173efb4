"""What all ranks have, put side by side: that ranks agree, and that every element is written exactly once.

``survey`` takes the records of every rank and gives, for each tensor, its boxes and which ranks have a copy of each.
Whatever is wrong is named: the tensor, its shape, and which cells are missing or doubled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from itertools import product
from typing import Any

import numpy as np

from anyckpt.containers.dcp.coverage import is_grid
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, few
from anyckpt.indexing import Shape
from anyckpt.tensor.nodes import corners
from anyckpt.torch.live import LiveState, is_of_optimizer
from anyckpt.torch.objects import Frozen, frozen

_SHOWN = 6
_MOST_CELLS = 1 << 20

PieceRecord = tuple[str, DType, Shape, Shape, Shape, "int | None"]
"""Name, element type, shape of the whole, first index, lengths, replica."""


@dataclass(frozen=True)
class ObjectRecord:
    """What a rank says of an object.

    Attributes:
        value: the object, if this rank's is the one that may be written.
        digest: equal for equal objects; None where copies need not be alike.
        replica: as of a ``LiveObject``.
        cell: as of a ``LiveObject``.
    """

    value: Frozen | None
    digest: int | None
    replica: int | None
    cell: tuple[str, Shape, Shape] | None = None


@dataclass(frozen=True)
class RankRecord:
    """What a rank tells the others of its state: everything but the elements."""

    pieces: tuple[PieceRecord, ...]
    objects: Mapping[str, ObjectRecord]
    paths: Mapping[str, tuple[Any, ...]]
    optimizers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Box:
    """A box of a tensor, and the ranks that have it, the one whose copy counts first."""

    offset: Shape
    sizes: Shape
    ranks: tuple[int, ...]


@dataclass
class Survey:
    """What all ranks have together.

    Attributes:
        tensors: name -> element type, shape and boxes, which cover the tensor once, in rising order.
        objects: name -> the object.
        paths: name -> keys that lead to it in the nested state.
        optimizers: keys at the top under which there is an optimizer's state.
    """

    tensors: dict[str, tuple[DType, Shape, list[Box]]] = field(default_factory=dict)
    objects: dict[str, Frozen] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    optimizers: set[str] = field(default_factory=set)

    def is_of_optimizer(self, name: str) -> bool:
        """Whether a tensor is of an optimizer's state."""
        return is_of_optimizer(name, self.paths, self.optimizers)


def record_of(live: LiveState, *, check_objects: bool = True) -> RankRecord:
    """What a rank tells the others.

    Args:
        live: what it has.
        check_objects: compare the copies of objects that should be alike.

    Raises:
        UsageError: an object cannot be pickled.
    """
    pieces = tuple(
        (piece.name, piece.dtype, piece.shape, piece.offset, piece.sizes, piece.replica) for piece in live.pieces
    )
    objects = {}
    for one in live.objects:
        if one.replica:
            objects[one.name] = ObjectRecord(None, None, one.replica, one.cell)
        else:
            value = frozen(one.name, one.value)
            digest = value.digest() if check_objects and one.replica is None else None
            objects[one.name] = ObjectRecord(value, digest, one.replica, one.cell)
    return RankRecord(pieces, objects, live.paths, frozenset(live.optimizers))


def survey(records: Sequence[RankRecord]) -> Survey:
    """Put the records of all ranks together.

    Raises:
        MappingError: ranks have a tensor with other shapes or types, elements of one are missing or there twice, or an
            object differs between ranks or is missing.
    """
    found = Survey()
    for record in records:
        found.optimizers |= record.optimizers
        for name, path in record.paths.items():
            found.paths.setdefault(name, path)
    by_name: dict[str, list[tuple[int, PieceRecord]]] = {}
    for rank, record in enumerate(records):
        for piece in record.pieces:
            by_name.setdefault(piece[0], []).append((rank, piece))
    for name, pieces in by_name.items():
        dtype = _agreed(name, "element type", [(rank, piece[1].name) for rank, piece in pieces])
        shape = _agreed(name, "shape", [(rank, piece[2]) for rank, piece in pieces])
        boxes = _boxes(name, shape, pieces)
        _check_cover(name, shape, boxes)
        kind = next(piece[1] for _, piece in pieces if piece[1].name == dtype)
        found.tensors[name] = kind, shape, sorted(boxes, key=lambda box: box.offset)
    for name in dict.fromkeys(name for record in records for name in record.objects):
        if name in found.tensors:
            raise MappingError("is a tensor on some ranks and an object on others", tensor=name)
        found.objects[name] = _object(name, records)
    _check_grids(records)
    return found


def _agreed(name: str, what: str, values: Iterable[tuple[int, Any]]) -> Any:
    """The value that all ranks have."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in values:
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return next(iter(ranks))
    told = [f"{_text(value)} on {_ranks(own)}" for value, own in ranks.items()]
    raise MappingError(
        f"ranks have the tensor with another {what}",
        tensor=name,
        expected=f"one {what} on all ranks",
        found="; ".join(told[:_SHOWN]),
        remedy="all ranks must save one model, each its part of the same whole tensors",
    )


def _boxes(name: str, shape: Shape, pieces: Sequence[tuple[int, PieceRecord]]) -> list[Box]:
    """The boxes that are written, each with the ranks that have a copy."""
    copies: dict[tuple[Shape, Shape], list[tuple[int, int | None]]] = {}
    for rank, (_, _, _, offset, sizes, replica) in pieces:
        if any(begin < 0 or begin + n > whole for begin, n, whole in zip(offset, sizes, shape, strict=True)):
            raise MappingError(
                f"a shard of rank {rank} lies outside the tensor",
                tensor=name,
                expected=f"within {list(shape)}",
                found=_cell(offset, sizes),
            )
        if math.prod(sizes) or not math.prod(shape):
            copies.setdefault((offset, sizes), []).append((rank, replica))
    found = []
    for (offset, sizes), own in copies.items():
        main = [rank for rank, replica in own if replica == 0]
        if len(main) > 1:
            raise MappingError(
                "is there twice, and each element must be written by one rank",
                tensor=name,
                expected=f"one rank whose copy of {_cell(offset, sizes)} of {list(shape)} counts",
                found=f"{_ranks(main)}",
                remedy="give copies the numbers of replicas: 0 on one rank only",
            )
        if not main and all(replica is not None for _, replica in own):
            continue  # copies of what nobody has are no part of the whole
        order = sorted(own, key=lambda one: (one[1] not in (0, None), one[0]))
        found.append(Box(offset, sizes, tuple(dict.fromkeys(rank for rank, _ in order))))
    return found


def _check_cover(name: str, shape: Shape, boxes: Sequence[Box]) -> None:
    if not math.prod(shape):
        return
    starts = corners([box.offset for box in boxes], len(shape))
    stops = starts + corners([box.sizes for box in boxes], len(shape))
    if is_grid(shape, starts, stops):
        return
    missing, doubled, grid = _uncovered(shape, boxes)
    if not missing and not doubled:
        return
    told = []
    if missing:
        told.append(f"missing {few(missing, _SHOWN)}")
    if doubled:
        told.append("twice " + few([f"{cell} (from {_ranks(ranks)})" for cell, ranks in doubled], _SHOWN))
    raise MappingError(
        "is not written exactly once by the ranks together",
        tensor=name,
        expected=f"every cell of {list(shape)}, which the ranks' shards divide into {' x '.join(map(str, grid))} cells",
        found="; ".join(told),
        remedy="all ranks must save: look for one whose shards are missing, or that describes another's",
    )


def _uncovered(shape: Shape, boxes: Sequence[Box]) -> tuple[list[str], list[tuple[str, list[int]]], Shape]:
    """Cells that no box has, those that several have with their ranks, and the number of cells along each axis.

    Cells are what the edges of all boxes divide the tensor into.
    """
    edges = [
        sorted({0, length, *(box.offset[a] for box in boxes), *(box.offset[a] + box.sizes[a] for box in boxes)})
        for a, length in enumerate(shape)
    ]
    grid = tuple(len(axis) - 1 for axis in edges)
    if math.prod(grid) > _MOST_CELLS:
        covered = sum(math.prod(box.sizes) for box in boxes)
        return [f"{math.prod(shape) - covered:,} elements, or as many more are there twice"], [], grid
    where = [{edge: number for number, edge in enumerate(axis)} for axis in edges]
    counts = np.zeros(grid, dtype=np.int32)
    inside = []
    for box in boxes:
        cells = tuple(
            slice(where[a][begin], where[a][begin + n])
            for a, (begin, n) in enumerate(zip(box.offset, box.sizes, strict=True))
        )
        counts[cells] += 1
        inside.append(cells)
    missing = [_span(edges, index) for index in np.argwhere(counts == 0).tolist()]
    doubled = []
    for index in np.argwhere(counts > 1).tolist():
        owners = [
            box.ranks[0]
            for box, cells in zip(boxes, inside, strict=True)
            if all(one.start <= at < one.stop for one, at in zip(cells, index, strict=True))
        ]
        doubled.append((_span(edges, index), sorted(owners)))
    return missing, doubled, grid


def _object(name: str, records: Sequence[RankRecord]) -> Frozen:
    """The one that is written."""
    own = [(rank, record.objects[name]) for rank, record in enumerate(records) if name in record.objects]
    main = [rank for rank, one in own if one.replica == 0]
    if len(main) > 1:
        raise MappingError("an object is there twice", tensor=name, expected="one rank's", found=_ranks(main))
    digests: dict[int, list[int]] = {}
    for rank, one in own:
        if one.digest is not None:
            digests.setdefault(one.digest, []).append(rank)
    if len(digests) > 1:
        told = "; ".join(f"one value on {_ranks(ranks)}" for ranks in list(digests.values())[:_SHOWN])
        raise MappingError(
            "an object differs between ranks, and one of them would be lost",
            tensor=name,
            expected="the same on all ranks",
            found=told,
            remedy="save what a rank has for itself under a name of its own, or pass check_objects=False to keep the"
            " first rank's",
        )
    value = next((one.value for _, one in own if one.value is not None), None)
    if value is None:
        raise MappingError(
            "no rank has the copy of an object that counts",
            tensor=name,
            found=f"copies on {_ranks([rank for rank, _ in own])}",
            remedy="one rank's must have replica 0",
        )
    return value


def _check_grids(records: Sequence[RankRecord]) -> None:
    """Raise MappingError unless each grid of objects has an object for each of its cells."""
    grids: dict[str, dict[Shape, int]] = {}
    shapes: dict[str, list[tuple[int, Any]]] = {}
    for rank, record in enumerate(records):
        for one in record.objects.values():
            if one.cell is not None and not one.replica:
                name, offset, shape = one.cell
                grids.setdefault(name, {})[offset] = rank
                shapes.setdefault(name, []).append((rank, shape))
    for name, cells in grids.items():
        shape = _agreed(name, "grid", shapes[name])
        missing = [list(cell) for cell in product(*map(range, shape)) if cell not in cells]
        if missing:
            raise MappingError(
                "objects of a grid are missing",
                tensor=name,
                expected=f"one for each cell of {list(shape)}",
                found=f"missing {few(missing, _SHOWN)}",
                remedy="all ranks must save",
            )


def _span(edges: Sequence[Sequence[int]], index: Sequence[int]) -> str:
    return "[" + ", ".join(f"{axis[at]}:{axis[at + 1]}" for axis, at in zip(edges, index, strict=True)) + "]"


def _cell(offset: Shape, sizes: Shape) -> str:
    return "[" + ", ".join(f"{begin}:{begin + n}" for begin, n in zip(offset, sizes, strict=True)) + "]"


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _ranks(numbers: Sequence[int]) -> str:
    ranks = list(dict.fromkeys(numbers))
    return f"rank{'s' * (len(ranks) > 1)} {few(ranks, _SHOWN)}"
