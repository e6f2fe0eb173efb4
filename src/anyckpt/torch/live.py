"""What one rank holds of a training job's state, in neutral words, and the way back into it.

``described(state)`` walks a nested state dict and gives a ``LiveState``: *pieces*, boxes of tensors that the whole job
holds, and *objects*, everything else.  Saving reads the pieces' tensors; loading fills them in place and hands objects
to their ``put``.  Names are paths joined by dots, as ``torch.distributed.checkpoint`` makes them (torch >= 2.4): every
mapping is descended into, a list where it holds a tensor or a mapping, and anything else is a leaf.

Kinds of tensors are told apart by ``KINDS``, functions that are asked in turn what a leaf is.  An entity of another
framework is one more kind; what a kind gives need not be named by its path.

Pieces know nothing of meshes or groups.  What several ranks hold alike is said by ``replica``: None if every rank that
has the very box has a copy of it (so it is with tensors of torch, whose mesh may be a part of the ranks), else a
number, of which 0 is the copy that counts: a box without one is a hole, and one with two is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from anyckpt.dtypes import DType, dtype
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.shared import nesting
from anyckpt.indexing import Shape
from anyckpt.operations.steps.live import obstacle
from anyckpt.torch.megatron.entities import has_entities

Path = tuple[Any, ...]
"""Keys of dictionaries as they are, and positions in lists as ``Index``."""

Put = Callable[[Any], None]

_DEEPEST = 100
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


Found = Sequence[LivePiece] | LiveObject
Kind = Callable[[str, Any, Put], Found | None]
"""What a leaf is, from its name by path, its value and what replaces it; None if it is of another kind."""


@torch.no_grad()
def described(state: Mapping[str, Any], *, to_fill: bool = False, device: Any = None) -> LiveState:
    """What this rank has of a nested state dict.

    What has ``state_dict`` and ``load_state_dict`` at the top (a module, an optimizer) is taken by the first and, when
    all is loaded, given to the second.  A state with sharded entities of Megatron-Core's is described by
    ``megatron.state``.

    Args:
        state: nested dictionaries and lists of tensors and objects.
        to_fill: it is loaded into, not saved.
        device: where memory is made for what is loaded and has none; the host's if None.

    Raises:
        UsageError: it is no mapping, two leaves have one name, or a tensor has no elements in memory that can be
            written.
    """
    if not isinstance(state, Mapping):
        raise UsageError(
            "there is no mapping of state to save or load",
            expected="a dictionary of tensors, objects and dictionaries by name",
            found=f"a {type(state).__name__}",
            remedy="give the state_dict() of a module",
        )
    if has_entities(state):
        from anyckpt.torch.megatron import state as megatron  # which is built of this module

        return megatron.state_to_fill(state, device) if to_fill else megatron.live_state(state)
    live = LiveState()
    for key, value in state.items():
        put = _setter(state, key)
        if not isinstance(value, torch.Tensor) and hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            inner = value.state_dict()
            live.finish.append(_giver(value, inner))
            live.owners.append(str(key))
            if isinstance(value, torch.optim.Optimizer) or key in nesting.OPTIMIZERS:
                live.optimizers.add(str(key))
            value = inner
        _walk(live, (key,), value, put)
    return live


def _walk(live: LiveState, path: Path, value: Any, put: Put) -> None:
    for inner, leaf, replace in _leaves(path, value, put):
        name = ".".join(map(str, inner))
        found = _found(name, leaf, replace)
        if isinstance(found, LiveObject):
            live.objects.append(found)
            names = {found.name}
        else:
            live.pieces += found
            names = {piece.name for piece in found}
        if name in names and name in live.paths:
            raise UsageError(
                "two parts of the state have one name",
                tensor=name,
                found=f"{list(live.paths[name])} and {list(inner)}",
                remedy="rename one: names are the keys of the path, joined by dots",
            )
        for one in names:
            live.paths.setdefault(one, inner)


def _found(name: str, leaf: Any, put: Put) -> Found:
    for kind in KINDS:
        found = kind(name, leaf, put)
        if found is not None:
            return found
    return LiveObject(name, leaf, put)


def _leaves(path: Path, value: Any, put: Put) -> Iterator[tuple[Path, Any, Put]]:
    if len(path) > _DEEPEST:
        raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner, _setter(value, key))
    elif isinstance(value, list) and _is_descended(value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, Index(index)), inner, _setter(value, index))
    else:
        yield path, value, put


def _is_descended(values: list[Any]) -> bool:
    """Whether torch's own traversal goes into a list rather than take it as a leaf."""
    return any(
        isinstance(inner, (Mapping, torch.Tensor)) or (isinstance(inner, list) and _is_descended(inner))
        for inner in values
    )


def _setter(container: Any, key: Any) -> Put:
    def put(value: Any) -> None:
        if not isinstance(container, (MutableMapping, list)):
            raise UsageError(
                "cannot be loaded into a container that does not change",
                tensor=str(key),
                found=f"a {type(container).__name__}",
                remedy="give a dictionary",
            )
        container[key] = value

    return put


def _giver(owner: Any, state: Any) -> Callable[[], None]:
    return lambda: owner.load_state_dict(state)


# -- kinds of tensors ----------------------------------------------------------------------------------------


def of_tensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A whole tensor of one process: ranks that have it have it alike."""
    if not isinstance(leaf, torch.Tensor):
        return None
    local = _elements(name, leaf)
    return [LivePiece(name, _dtype(name, local), tuple(local.shape), (0,) * local.ndim, local)]


def of_dtensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A DTensor: FSDP2, tensor parallelism, meshes of several axes, uneven shards.

    Where a shard of ``_StridedShard`` is several runs of the whole, each is a piece.
    """
    if not hasattr(leaf, "device_mesh") or not hasattr(leaf, "placements") or not isinstance(leaf, torch.Tensor):
        return None
    dtensor: Any = leaf
    mesh, coordinate = dtensor.device_mesh, dtensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    ways = []
    for placement in dtensor.placements:
        if placement.is_partial():
            raise UsageError(
                "is a DTensor with partial sums, of which no rank has the elements",
                tensor=name,
                remedy="redistribute it to Shard or Replicate",
            )
        ways.append((getattr(placement, "dim", None), getattr(placement, "split_factor", 1)))
    shard = dtensor.to_local()
    if hasattr(shard, "trigger_wait"):  # of a collective that may not have ended
        shard = shard.trigger_wait()
    local = _elements(name, shard)
    kind, shape = _dtype(name, local), tuple(dtensor.shape)
    boxes = _shard_boxes(shape, tuple(ways), tuple(coordinate), tuple(mesh.shape))
    if len(boxes) == 1 and boxes[0][2] == local.shape and 0 not in local.shape:
        return [LivePiece(name, kind, shape, boxes[0][0], local)]
    found = []
    for offset, start, sizes in boxes:
        part = local
        for axis, (begin, length) in enumerate(zip(start, sizes, strict=True)):
            part = part.narrow(axis, begin, length)
        if part.numel():
            found.append(LivePiece(name, kind, shape, offset, part))
    return found or ([LivePiece(name, kind, shape, (0,) * len(shape), local)] if 0 in shape else [])


def of_sharded_tensor(name: str, leaf: Any, put: Put) -> Found | None:
    """A ShardedTensor of torch's first generation (FSDP's ``SHARDED_STATE_DICT``)."""
    if type(leaf).__name__ != "ShardedTensor" or not hasattr(leaf, "local_shards"):
        return None
    shape = tuple(leaf.metadata().size)
    found = []
    for shard in leaf.local_shards():
        local = _elements(name, shard.tensor)
        offset = tuple(shard.metadata.shard_offsets)
        found.append(LivePiece(name, _dtype(name, local), shape, offset, local))
    return found


KINDS: list[Kind] = [of_sharded_tensor, of_dtensor, of_tensor]
"""Asked in turn; what is of none is an object."""


def shard_runs(runs: Sequence[tuple[int, int]], count: int, index: int, split_factor: int = 1) -> list[tuple[int, int]]:
    """The runs (start, length) of an axis that one of ``count`` shards takes of the runs that are given.

    Args:
        runs: what is divided, in order.
        count: number of shards; each has the length rounded up, the last ones what is left, as ``torch.chunk``.
        index: which.
        split_factor: of ``_StridedShard``: what is given is first divided so, and each part divided into shards.
    """
    total = sum(length for _, length in runs)
    found: list[tuple[int, int]] = []
    part = -(-total // split_factor)
    for number in range(split_factor):
        first, last = min(total, number * part), min(total, (number + 1) * part)
        step = -(-(last - first) // count)
        start, stop = min(last, first + index * step), min(last, first + (index + 1) * step)
        for begin, length in _between(runs, start, stop):
            if found and sum(found[-1]) == begin:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((begin, length))
    return found


def _between(runs: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The runs of elements ``[start, stop)``, counted along the runs."""
    before = 0
    for begin, length in runs:
        low, high = max(start, before), min(stop, before + length)
        if high > low:
            yield begin + low - before, high - low
        before += length


@lru_cache(maxsize=1 << 14)
def _shard_boxes(
    shape: Shape, ways: tuple[tuple[int | None, int], ...], coordinate: Shape, mesh: Shape
) -> tuple[tuple[Shape, Shape, Shape], ...]:
    """The boxes of a whole tensor that one rank has: where each begins in the whole, and in its local tensor; lengths.

    Args:
        shape: the whole's.
        ways: for each axis of the mesh the axis of the tensor that is divided along it, None if none is, and how often
            that is divided before (see ``shard_runs``).
        coordinate: the rank's.
        mesh: its lengths.
    """
    runs = [[(0, length)] for length in shape]
    for (along, split), index, count in zip(ways, coordinate, mesh, strict=True):
        if along is not None:
            runs[along] = shard_runs(runs[along], count, index, split)
    before = [[sum(length for _, length in axis[:number]) for number in range(len(axis))] for axis in runs]
    return tuple(
        (
            tuple(runs[axis][number][0] for axis, number in enumerate(chosen)),
            tuple(before[axis][number] for axis, number in enumerate(chosen)),
            tuple(runs[axis][number][1] for axis, number in enumerate(chosen)),
        )
        for chosen in product(*(range(len(axis)) for axis in runs))
    )


def _elements(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its gradient's history, whose elements are in memory.

    Raises:
        UsageError: they are not, or are more than numbers.
    """
    problem = obstacle(torch, tensor)
    if problem is not None:
        problem.tensor = name
        raise problem
    plain = tensor.detach()
    return plain.data if type(plain) is torch.nn.Parameter else plain


def _dtype(name: str, tensor: torch.Tensor) -> DType:
    try:
        return dtype(tensor.dtype)
    except FormatError as error:
        raise UsageError(error.problem, tensor=name, expected=error.expected) from None
