"""Where one rank's part of a distributed tensor lies in the whole.

A ``DTensor`` says how it is placed on each axis of a mesh of ranks, and where in the mesh its rank is; a
``ShardedTensor`` (FSDP1 without a mesh) says where each of its shards begins.

Facts: ``tensor/_utils.py`` and ``tensor/placement_types.py`` of torch 2.2 to 2.13 (a dimension is cut as
``torch.chunk`` does, so that the last parts may be short or empty; ``_StridedShard`` is FSDP over tensor parallelism,
which cuts first along the axes to its right), ``device_mesh.py`` (to 2.8 the mesh is a tensor, then a layout) and
``_shard/sharded_tensor/api.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from anyckpt.containers.torch_file.values import DistributedTensor, brief
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.indexing import Shape
from anyckpt.pickling import Global, Record
from anyckpt.tensor import LazyTensor

SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
SHARD = "torch.distributed._shard.sharded_tensor.shard.Shard"

_PLACEMENT = re.compile(r"(?P<strided>_Strided)?Shard\((?P<axis>\d{1,2})(?:, (?P<factor>\d{1,9}))?\)")
_RESHARD = "load it in the software that wrote it and save a full state dict"


@dataclass(frozen=True)
class Mesh:
    """The ranks that a tensor is spread over.

    Attributes:
        sizes: ranks along each axis.
        names: of the axes, empty where they have none.
        coordinate: of the rank whose file it is; None if that rank is not in the mesh.
    """

    sizes: Shape
    names: tuple[str, ...]
    coordinate: Shape | None

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        names = self.names if len(self.names) == len(self.sizes) else ("ranks",) * len(self.sizes)
        return " x ".join(f"{name} {size}" for name, size in zip(names, self.sizes, strict=True))

    def place(self) -> str:
        """Which rank of the mesh it is, in words."""
        if self.coordinate is None:
            return f"of a rank outside the mesh of {self}"
        names = self.names if len(self.names) == len(self.sizes) else ("rank",) * len(self.sizes)
        facts = zip(names, self.coordinate, self.sizes, strict=True)
        return ", ".join(f"{name} {at} of {size}" for name, at, size in facts)


@dataclass(frozen=True)
class Piece:
    """A box of a tensor.

    Attributes:
        start: index of its first element in the whole.
        tensor: its elements.
        copy: whether another rank, which comes first, holds the same.
    """

    start: Shape
    tensor: LazyTensor
    copy: bool = False


def mesh_of(tensor: DistributedTensor, path: str, name: str) -> Mesh:
    """The mesh of a ``DTensor``.

    Raises:
        FormatError: it is of a form that no torch writes.
    """
    mesh = tensor.spec.get("mesh") if isinstance(tensor.spec, Record) else None
    if not isinstance(mesh, Record):
        raise _unknown("says nothing of its mesh of ranks", path, name, None)
    sizes = _mesh_sizes(mesh)
    if sizes is None or len(sizes) != len(tensor.placements) or not all(0 < n < 1 << 24 for n in sizes):
        raise _unknown("has a mesh of ranks of unknown form", path, name, sizes)
    names = mesh.get("_mesh_dim_names") or mesh.get("mesh_dim_names") or ()
    at = mesh.get("_coordinate_on_dim")
    coordinate = tuple(at) if isinstance(at, (list, tuple)) else None
    if coordinate is not None and not _inside(coordinate, sizes):
        raise _unknown("is of a rank outside its mesh", path, name, brief(coordinate))
    return Mesh(
        sizes, tuple(n for n in names if type(n) is str) if isinstance(names, (list, tuple)) else (), coordinate
    )


def _mesh_sizes(mesh: Record) -> Shape | None:
    for key in ("mesh", "_mesh"):
        ranks = mesh.get(key)
        if isinstance(ranks, LazyTensor):
            return ranks.shape
    layout = mesh.get("_layout")
    if not isinstance(layout, Record):
        return None
    axes = layout.get("axes")
    if isinstance(axes, (list, tuple)):
        return _products([axis.get("shape") if isinstance(axis, Record) else None for axis in axes])
    shape = layout.get("shape")
    return _products(shape if isinstance(shape, (list, tuple)) else [shape])


def _products(axes: Sequence[Any]) -> Shape | None:
    """The length of each axis, which may be folded of several, or of none where it is 1."""
    found: list[int] = []
    for axis in axes:
        folds = axis if isinstance(axis, (list, tuple)) else [axis]
        if not all(type(n) is int for n in folds):
            return None
        found.append(math.prod(folds))
    return tuple(found)


def _inside(coordinate: Sequence[Any], sizes: Shape) -> bool:
    return len(coordinate) == len(sizes) and all(
        type(at) is int and 0 <= at < size for at, size in zip(coordinate, sizes, strict=True)
    )


def piece_of(tensor: DistributedTensor, path: str, name: str) -> Piece | None:
    """The box that a rank's part of a ``DTensor`` is; None if the rank has no part of it.

    Raises:
        FormatError: the placement is not one that tells a box, or the part has another shape than it asks for.
    """
    mesh = mesh_of(tensor, path, name)
    if mesh.coordinate is None:
        return None
    start, shape = box(tensor.shape, mesh, tensor.placements, _stated_order(tensor.spec), path, name)
    local = tensor.local
    if math.prod(shape) == 0 and local.size == 0:
        return None
    if local.shape != shape:
        raise FormatError(
            "has another shape than its placement gives its rank",
            path=path,
            tensor=name,
            expected=f"{shape} of {tensor.shape} by {', '.join(tensor.placements)} over {mesh}",
            found=local.shape,
        )
    replicated = [at for at, kind in zip(mesh.coordinate, tensor.placements, strict=True) if kind == "Replicate()"]
    return Piece(start, local, copy=any(replicated))


def box(
    shape: Shape, mesh: Mesh, placements: Sequence[str], order: Mapping[int, Sequence[int]], path: str, name: str
) -> tuple[Shape, Shape]:
    """Start and shape of the part at the mesh's coordinate.

    Args:
        shape: of the whole.
        mesh: with a coordinate.
        placements: one per axis of the mesh.
        order: axis of the tensor -> axes of the mesh in the order in which it is cut, where that is stated.
        path: for messages.
        name: for messages.

    Raises:
        FormatError: a placement is of another kind, or cuts a part that is no box.
    """
    assert mesh.coordinate is not None
    cuts: dict[int, list[int]] = {}
    factors: dict[int, int] = {}
    for number, placement in enumerate(placements):
        if placement == "Replicate()":
            continue
        found = _PLACEMENT.fullmatch(placement)
        if found is None or int(found["axis"]) >= len(shape) or bool(found["strided"]) != bool(found["factor"]):
            if mesh.sizes[number] == 1 and found is None:
                continue
            raise FormatError(
                "is placed on ranks in a way that is not understood",
                path=path,
                tensor=name,
                expected="Shard, Replicate, or _StridedShard as FSDP with tensor parallelism writes it",
                found=placement[:60],
                remedy=_RESHARD,
            )
        cuts.setdefault(int(found["axis"]), []).append(number)
        if found["strided"]:
            factors[number] = int(found["factor"])
    start, extent = [0] * len(shape), [*shape]
    for axis, own in cuts.items():
        for number in _in_order(own, factors, mesh, extent[axis], order.get(axis), path, name):
            chunk = -(-extent[axis] // mesh.sizes[number])
            skipped = min(chunk * mesh.coordinate[number], extent[axis])
            start[axis] += skipped
            extent[axis] = min(chunk, extent[axis] - skipped)
    return tuple(start), tuple(extent)


def _in_order(
    own: Sequence[int],
    factors: Mapping[int, int],
    mesh: Mesh,
    length: int,
    stated: Sequence[int] | None,
    path: str,
    name: str,
) -> Sequence[int]:
    """The mesh's axes that cut one axis of the tensor, in the order in which they cut."""
    strided = [number for number in own if number in factors]
    if not strided:
        return own if stated is None or sorted(stated) != sorted(own) else stated
    plain = [number for number in own if number not in factors]
    order = [*plain, *reversed(strided)]
    before = 1
    understood = length % math.prod(mesh.sizes[number] for number in own) == 0
    for position, number in enumerate(order):
        if number in factors:
            understood &= factors[number] == before and all(earlier > number for earlier in order[:position])
        before *= mesh.sizes[number]
    if not understood:
        raise FormatError(
            "is cut by a _StridedShard whose parts are no boxes",
            path=path,
            tensor=name,
            expected="an axis divisible by its ranks, cut from the mesh's last axis to its first",
            found=f"split factors {', '.join(map(str, factors.values()))} over {mesh}, length {length}",
            remedy=_RESHARD,
        )
    return order


def _stated_order(spec: Record) -> dict[int, Sequence[int]]:
    """What torch 2.10 and later say of the order: (axis, axes of the mesh) each."""
    stated = spec.get("shard_order")
    found: dict[int, Sequence[int]] = {}
    for entry in stated if isinstance(stated, (list, tuple)) else ():
        facts = entry.args if isinstance(entry, Record) and entry.args else entry
        if isinstance(facts, tuple) and len(facts) == 2 and type(facts[0]) is int and isinstance(facts[1], tuple):
            found[facts[0]] = facts[1]
    return found


def is_sharded_tensor(value: Any) -> bool:
    """Whether it is the record of a ``ShardedTensor``."""
    return (
        isinstance(value, Record)
        and len(value.args) == 4
        and isinstance(value.args[1], Global)
        and value.args[1].path == SHARDED_TENSOR
    )


def sharded_pieces(value: Record, path: str, name: str) -> tuple[Shape, list[Piece]]:
    """Shape of a ``ShardedTensor`` and the shards of it that its rank has.

    Raises:
        FormatError: it is of another form than torch writes.
    """
    state = value.args[3]
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[1], Record):
        raise _unknown("is a ShardedTensor of unknown form", path, name, None)
    size = state[1].get("size")
    pieces = []
    for shard in state[0] if isinstance(state[0], (list, tuple)) else ():
        metadata = shard.get("metadata") if isinstance(shard, Record) else None
        tensor = shard.get("tensor") if isinstance(shard, Record) else None
        start = metadata.get("shard_offsets") if isinstance(metadata, Record) else None
        if not isinstance(tensor, LazyTensor) or not _is_shape(start) or len(start) != tensor.ndim:
            raise _unknown("is a ShardedTensor with a shard of unknown form", path, name, None)
        if tensor.size:
            pieces.append(Piece(tuple(start), tensor))
    if not _is_shape(size):
        raise _unknown("is a ShardedTensor of unknown size", path, name, brief(size))
    return tuple(size), pieces


def _is_shape(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (list, tuple)) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _unknown(problem: str, path: str, name: str, found: object) -> FormatError:
    return FormatError(problem, path=path, tensor=name, found=found, remedy=_RESHARD)
