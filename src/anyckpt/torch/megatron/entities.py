"""What Megatron-Core's ``dist_checkpointing`` puts into state dicts, and the same of ours, which need no Megatron.

Theirs and ours are told by their attributes, so that any release's are taken as they are.  Facts: Megatron-Core 0.8 to
0.20 ``dist_checkpointing/mapping.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any

import torch

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.indexing import Shape

ReplicaId = int | tuple[int, ...]
Path = tuple[Any, ...]

_DEEPEST = 100
_PLAIN = (torch.Tensor, int, float, str, tuple, type(None))


@dataclass
class ShardedTensor:
    """A rank's box of a tensor that the whole job holds.

    Attributes:
        key: the tensor's name in the checkpoint.
        data: the elements, of ``local_shape``; a run of them, one axis, with ``flattened_range``.  None where memory is
            to be made while loading.
        dtype: element type.
        local_shape: lengths of the box, without the axes that are prepended.
        global_shape: lengths of the whole.
        global_offset: index of the box's first element in the whole.
        axis_fragmentations: into how many boxes each axis is divided; None where they are no regular grid.
        replica_id: which copy of the box it is; the one whose numbers are all 0 is written.
        prepend_axis_num: leading axes that only the whole has, such as the layer.
        allow_shape_mismatch: a checkpoint may have other lengths: what both have is loaded, the rest is zero.
        flattened_range: which elements of the box, counted in C order, ``data`` has; all if None.
    """

    key: str
    data: torch.Tensor | None = field(repr=False)
    dtype: torch.dtype
    local_shape: Shape
    global_shape: Shape
    global_offset: Shape
    axis_fragmentations: Shape | None = None
    replica_id: ReplicaId = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    flattened_range: slice | None = None

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: torch.Tensor,
        *rank_offsets: tuple[int, int, int],
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        allow_shape_mismatch: bool = False,
    ) -> ShardedTensor:
        """A box of a regular grid.

        Args:
            key, data, replica_id, prepend_axis_num, allow_shape_mismatch: see the attributes.
            rank_offsets: (axis, number of this box along it, how many there are), for each axis that is divided;
                axes that are prepended count.

        Raises:
            UsageError: there is no such axis, or no such box along it.
        """
        local = (1,) * prepend_axis_num + tuple(data.shape)
        offset, fragments = [0] * len(local), [1] * len(local)
        for axis, number, count in rank_offsets:
            if not 0 <= axis < len(local) or not 0 <= number < count:
                raise UsageError(
                    "there is no such part of the tensor",
                    tensor=key,
                    expected=f"an axis below {len(local)}, and a number below the count along it",
                    found=f"axis {axis}, {number} of {count}",
                )
            offset[axis], fragments[axis] = number * local[axis], count
        return cls(
            key,
            data,
            data.dtype,
            tuple(data.shape),
            tuple(length * count for length, count in zip(local, fragments, strict=True)),
            tuple(offset),
            tuple(fragments),
            replica_id,
            prepend_axis_num,
            allow_shape_mismatch,
        )

    def without_data(self) -> ShardedTensor:
        """The same description of no elements."""
        return replace(self, data=None)


@dataclass
class ShardedObject:
    """A rank's cell of a grid of objects, which cannot be divided otherwise.

    Attributes:
        key: the grid's name.
        data: the object.
        global_shape: cells along each axis.
        global_offset: which cell.
        replica_id: as of a tensor.
    """

    key: str
    data: Any
    global_shape: Shape
    global_offset: Shape
    replica_id: ReplicaId = 0

    @property
    def unique_key(self) -> str:
        """The object's name in the checkpoint."""
        return unique_key(self)


@dataclass
class ShardedTensorFactory:
    """A tensor that is stored as something else: several tensors, or one in another order.

    Attributes:
        key: given to ``build_fn``.
        data: the tensor.
        build_fn: from key, tensor, replica and flattened range to what is stored: entities in dictionaries and lists.
        merge_fn: from the same with what was loaded for entities, back to a tensor.
        replica_id: given to ``build_fn``.
        flattened_range: given to ``build_fn``.
    """

    key: str
    data: torch.Tensor
    build_fn: Callable[[str, torch.Tensor, ReplicaId, slice | None], Any]
    merge_fn: Callable[[Any], Any]
    replica_id: ReplicaId = 0
    flattened_range: slice | None = None

    def build(self) -> Any:
        """What is stored."""
        return self.build_fn(self.key, self.data, self.replica_id, self.flattened_range)


class LocalNonpersistentObject:
    """What is not stored; loading gives back the very object."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def unwrap(self) -> Any:
        return self.obj


def is_tensor(value: Any) -> bool:
    """Whether it is a sharded tensor of Megatron-Core or of ours; torch's own ``ShardedTensor`` is none."""
    return hasattr(value, "key") and hasattr(value, "local_shape") and hasattr(value, "global_offset")


def is_object(value: Any) -> bool:
    return hasattr(value, "key") and hasattr(value, "global_offset") and not hasattr(value, "local_shape")


def is_factory(value: Any) -> bool:
    return hasattr(value, "build_fn") and hasattr(value, "merge_fn")


def is_local(value: Any) -> bool:
    return type(value).__name__ == "LocalNonpersistentObject" and hasattr(value, "unwrap")


def is_entity(value: Any) -> bool:
    return is_tensor(value) or is_object(value) or is_factory(value) or is_local(value)


def is_main(replica_id: ReplicaId) -> bool:
    """Whether it is the copy that is written."""
    return replica_id == 0 if isinstance(replica_id, int) else not any(replica_id)


def unique_key(entity: Any) -> str:
    """The name in the checkpoint of a sharded object, such as ``rng_state/shard_0.1_2.2``."""
    offset, shape = (".".join(map(str, numbers)) for numbers in (entity.global_offset, entity.global_shape))
    return f"{entity.key}/shard_{offset}_{shape}"


def name_of(entity: Any) -> str:
    """The name in the checkpoint of what an entity is stored as."""
    return str(entity.key) if is_tensor(entity) else unique_key(entity)


def has_entities(state: Any, depth: int = 0) -> bool:
    """Whether a nested state has any of these, as far down as states go."""
    if depth > _DEEPEST:
        return False
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
    for value in values:
        if isinstance(value, (Mapping, list)):
            if has_entities(value, depth + 1):
                return True
        elif not isinstance(value, _PLAIN) and is_entity(value):
            return True
    return False


def check_depth(depth: int) -> None:
    """Raise UsageError if containers are nested deeper than states are."""
    if depth > _DEEPEST:
        raise UsageError("containers are nested too deep, or hold themselves", expected=f"{_DEEPEST} levels")


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Whatever is no dictionary and no list, with the keys that lead to it; empty containers among them."""
    check_depth(len(path))
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value
