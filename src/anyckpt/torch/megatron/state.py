"""A state dict of Megatron-Core's taken apart: what is sharded, what ranks have in common, and the way back.

The state that is given stays as it is: factories are asked what they store, and their answers kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.indexing import Shape, flat_boxes
from anyckpt.torch.live import LiveObject, LivePiece, LiveState
from anyckpt.torch.megatron.entities import (
    Path,
    check_depth,
    is_factory,
    is_local,
    is_main,
    is_object,
    is_tensor,
    leaves,
    name_of,
    unique_key,
)
from anyckpt.torch.tensor_kinds import dtype_of

ABSENT: Any = object()
"""What stands for a part of a state that there is nothing of."""


@dataclass(frozen=True)
class _Built:
    """A factory and what it stores."""

    factory: Any
    stored: Any


@dataclass(frozen=True)
class Parts:
    """A state, taken apart.

    Attributes:
        tree: the state with ``_Built`` in place of factories.
        sharded: every sharded tensor and object, with the keys that lead to it.
    """

    tree: Any
    sharded: list[tuple[Path, Any]]

    def tensors(self) -> Iterator[Any]:
        """The sharded tensors."""
        return (entity for _, entity in self.sharded if is_tensor(entity))

    def objects(self) -> Iterator[Any]:
        """The sharded objects."""
        return (entity for _, entity in self.sharded if is_object(entity))

    def common(self) -> dict[str, Any]:
        """What is neither sharded nor local, in its dictionaries and lists."""
        found = _common(self.tree)
        return {} if found is ABSENT else dict(found)

    def loaded(self, value_of: Callable[[Any], Any]) -> Any:
        """The state with what was loaded in place of what is sharded, local objects as they are, and nothing common.

        Args:
            value_of: what was loaded for a sharded tensor or object; ``ABSENT`` leaves it out.
        """
        found = _loaded(self.tree, value_of)
        return {} if found is ABSENT else found


def parts_of(state: Mapping[str, Any]) -> Parts:
    """Take a state apart."""
    tree = _with_built(state)
    return Parts(tree, [(path, leaf) for path, leaf in _sharded(tree)])


def live_state(state: Mapping[str, Any]) -> LiveState:
    """What a rank has, in the words of ``anyckpt.torch.live``: names are keys, whatever the paths are.

    Raises:
        UsageError: a tensor has no elements in memory, or its description does not fit them.
    """
    parts = parts_of(state)
    live = LiveState()
    for entity in parts.tensors():
        live.pieces += pieces_of(entity)
        live.paths[entity.key] = (entity.key,)
    for entity in parts.objects():
        name = unique_key(entity)
        cell = (entity.key, tuple(entity.global_offset), tuple(entity.global_shape))
        live.objects.append(LiveObject(name, entity.data, _nowhere, _replica(entity.replica_id), cell))
        live.paths[name] = (name,)
    for key, value in parts.common().items():
        live.objects.append(LiveObject(str(key), value, _nowhere))
        live.paths[str(key)] = (key,)
    return live


def state_to_fill(state: Mapping[str, Any], device: Any = None) -> LiveState:
    """The same for loading.  At the end the state becomes what ``dist_checkpointing.load`` gives: what was loaded in
    place of entities, and the checkpoint's common state in place of the rest; what the checkpoint lacks is left out.

    Args:
        state: with entities, of which some may have no elements.
        device: where memory is made for these.

    Raises:
        UsageError: the state is no dictionary that can be changed, or an entity's description does not fit its tensor.
    """
    if not isinstance(state, MutableMapping):
        raise UsageError("is loaded in place", expected="a dictionary", found=f"a {type(state).__name__}")
    parts = parts_of(state)
    live = LiveState()
    loaded: dict[int, Any] = {}
    for entity in parts.tensors():
        loaded[id(entity)] = memory_of(entity, device)
        live.pieces += pieces_of(WithData(entity, loaded[id(entity)]))
        live.paths[entity.key] = (entity.key,)
    for entity in parts.objects():
        name = unique_key(entity)
        put = partial(loaded.__setitem__, id(entity))
        live.objects.append(LiveObject(name, entity.data, put, _replica(entity.replica_id)))
        live.paths[name] = (name,)

    def replace_all(common: Mapping[str, Any], lacking: Collection[str]) -> None:
        found = parts.loaded(lambda one: ABSENT if name_of(one) in lacking else loaded.get(id(one), ABSENT))
        whole = merged(dict(common), found)
        state.clear()
        state.update(whole)

    live.replace_all = replace_all
    return live


def memory_of(entity: Any, device: Any = None) -> torch.Tensor:
    """The elements that are loaded into, made if there are none; zero where the checkpoint may have fewer."""
    run = getattr(entity, "flattened_range", None)
    data: torch.Tensor | None = entity.data
    if data is None:
        shape = tuple(entity.local_shape) if run is None else (run.stop - run.start,)
        data = torch.empty(shape, dtype=entity.dtype, device=device)
    data = _plain(data)
    return data.zero_() if entity.allow_shape_mismatch else data


class WithData:
    """A sharded tensor with other elements."""

    def __init__(self, entity: Any, data: torch.Tensor) -> None:
        self._entity = entity
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entity, name)


def pieces_of(entity: Any) -> list[LivePiece]:
    """The boxes of the whole tensor that a sharded tensor's elements are; several if they are a run of a flattened box.

    Raises:
        UsageError: there are no elements, or not as many as the description says.
    """
    data: torch.Tensor | None = entity.data
    name = str(entity.key)
    if data is None:
        raise UsageError("has no elements to save", tensor=name, remedy="give the sharded tensor its data")
    kind, data = dtype_of(name, data), _plain(data)
    lead, local = (1,) * entity.prepend_axis_num, tuple(entity.local_shape)
    shape, offset = tuple(entity.global_shape), tuple(entity.global_offset)
    if len(shape) != len(lead) + len(local) or len(offset) != len(shape):
        raise UsageError(
            "the whole has another number of axes than the box with those that are prepended",
            tensor=name,
            expected=f"{len(lead) + len(local)} axes",
            found=f"shape {shape}, offset {offset}",
        )
    replica, resizable = _replica(entity.replica_id), bool(entity.allow_shape_mismatch)
    run = getattr(entity, "flattened_range", None)
    expected = local if run is None else (run.stop - run.start,)
    if tuple(data.shape) != expected:
        raise UsageError("has another shape than its description", tensor=name, expected=expected, found=data.shape)
    if run is None:
        return [LivePiece(name, kind, shape, offset, data[(None,) * len(lead)] if lead else data, replica, resizable)]
    found, position = [], 0
    for start, sizes in flat_boxes(local, run.start, run.stop - run.start):
        count = _count(sizes)
        box = data[position : position + count].view(lead + sizes)
        begin = tuple(a + b for a, b in zip(offset, (0,) * len(lead) + start, strict=True))
        found.append(LivePiece(name, kind, shape, begin, box, replica, resizable))
        position += count
    return found


def merged(into: Any, found: Any, path: Path = ()) -> Any:
    """What the checkpoint has in common with what was loaded, as one state; ``into`` is changed.

    Raises:
        UsageError: both have a value at one place, or lists of other lengths.
    """
    if isinstance(into, dict) and isinstance(found, Mapping):
        for key, value in found.items():
            into[key] = merged(into[key], value, (*path, key)) if key in into else value
        return into
    if isinstance(into, list) and isinstance(found, (list, Mapping)):
        items = found.items() if isinstance(found, Mapping) else enumerate(found)
        if isinstance(found, list) and len(found) != len(into):
            raise _conflict(path, f"lists of {len(into)} and {len(found)}")
        for index, value in items:
            if type(index) is not int or not 0 <= index < len(into):
                raise _conflict(path, f"a list of {len(into)} and an item {index!r}")
            into[index] = merged(into[index], value, (*path, index))
        return into
    raise _conflict(path, f"a {type(into).__name__} and a {type(found).__name__}")


def _conflict(path: Path, found: str) -> UsageError:
    return UsageError(
        "the state has something else at one place than the checkpoint's common state",
        tensor=".".join(map(str, path)),
        found=found,
        remedy="build the state as it was built for saving",
    )


# -- taking apart --------------------------------------------------------------------------------------------


def _with_built(value: Any, depth: int = 0) -> Any:
    check_depth(depth)
    if isinstance(value, Mapping):
        return {key: _with_built(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_built(inner, depth + 1) for inner in value]
    return _Built(value, _with_built(value.build(), depth + 1)) if is_factory(value) else value


def _sharded(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in leaves(tree):
        if isinstance(leaf, _Built):
            yield from ((path + inner, entity) for inner, entity in _sharded(leaf.stored))
        elif is_tensor(leaf) or is_object(leaf):
            yield path, leaf


def _common(tree: Any) -> Any:
    if isinstance(tree, dict):
        found = {key: inner for key, value in tree.items() if (inner := _common(value)) is not ABSENT}
        return found if found or not tree else ABSENT
    if isinstance(tree, list):
        items = [inner for value in tree if (inner := _common(value)) is not ABSENT]
        return items if items or not tree else ABSENT
    special = isinstance(tree, _Built) or is_tensor(tree) or is_object(tree) or is_local(tree)
    return ABSENT if special else tree


def _loaded(tree: Any, value_of: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        found = {key: inner for key, value in tree.items() if (inner := _loaded(value, value_of)) is not ABSENT}
        return found or ABSENT
    if isinstance(tree, list):
        items = {index: inner for index, value in enumerate(tree) if (inner := _loaded(value, value_of)) is not ABSENT}
        return (list(items.values()) if len(items) == len(tree) else items) or ABSENT
    if isinstance(tree, _Built):
        inner = _loaded(tree.stored, value_of)
        return ABSENT if inner is ABSENT else tree.factory.merge_fn(inner)
    if is_local(tree):
        return tree.unwrap()
    return value_of(tree) if is_tensor(tree) or is_object(tree) else ABSENT


def _replica(replica_id: Any) -> int:
    """0 for the copy that counts."""
    return 0 if is_main(replica_id) else 1


def _plain(data: torch.Tensor) -> torch.Tensor:
    """Elements that are in memory: a DTensor's own part, and the numbers that Transformer Engine's FP8 stands for.

    Megatron-Core saves these numbers, too, and loads into such, which the model makes FP8 again.
    """
    plain = data.detach()
    plain = plain.to_local() if hasattr(plain, "to_local") else plain
    is_other = type(plain).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return plain.dequantize() if is_other else plain


def _count(sizes: Shape) -> int:
    total = 1
    for length in sizes:
        total *= length
    return total


def _nowhere(value: Any) -> None:
    """Megatron's states are not loaded in place: ``loading`` gives a new one."""
