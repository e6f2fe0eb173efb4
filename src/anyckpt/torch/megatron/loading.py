"""Loading into a state dict of Megatron-Core's: slices into its tensors, and its objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from anyckpt.containers.dcp import DcpContents
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, MappingError, few
from anyckpt.tensor import LazyTensor
from anyckpt.torch.megatron.entities import is_tensor, name_of, unique_key
from anyckpt.torch.megatron.state import ABSENT, Parts, WithData, memory_of, pieces_of
from anyckpt.torch.objects import Thawing
from anyckpt.torch.reading import Target, fill

_SHOWN = 20


@dataclass(frozen=True)
class Found:
    """What can be loaded.

    Attributes:
        path: of the checkpoint.
        tensors: by key.
        objects: of sharded objects, unique key -> gives it, as plain data and inert records.
    """

    path: str
    tensors: Mapping[str, LazyTensor]
    objects: Mapping[str, Callable[[], Any]]


def found_in_folder(path: str, contents: DcpContents) -> Found:
    """What a distributed checkpoint has beside its common state."""
    objects = contents.objects
    return Found(path, contents.tensors, {name: _getter(objects, name) for name in objects})


def _getter(objects: Mapping[str, Any], name: str) -> Callable[[], Any]:
    return lambda: objects[name]


def values(
    parts: Parts,
    found: Found,
    thawing: Thawing,
    *,
    cast: bool = True,
    workers: int | None = None,
) -> Callable[[Any], Any]:
    """Load what is sharded; gives the value of each entity.

    Args:
        parts: the state.
        found: the checkpoint.
        thawing: makes live objects.
        cast: take elements of another type, rounded; refuse them otherwise.
        workers: threads of this rank.

    Raises:
        FormatError: bytes are missing or damaged.
        MappingError: the checkpoint has not what is asked for, or with another shape or type; all of it is named.
        UnsafeError: an object is of a class that nobody allowed.
    """
    wanted = [entity for _, entity in parts.sharded]
    _check(wanted, found, cast)
    made: dict[int, Any] = {}
    targets: list[Target] = []
    for entity in wanted:
        if is_tensor(entity):
            made[id(entity)] = memory_of(entity)
            targets += _targets(entity, made[id(entity)], found.tensors[entity.key])
    fill(targets, workers=workers)
    for entity in wanted:
        if not is_tensor(entity):
            name = unique_key(entity)
            made[id(entity)] = _object(thawing, found.objects[name](), name, found.path)
    return lambda entity: made.get(id(entity), ABSENT)


def _check(wanted: Iterable[Any], found: Found, cast: bool) -> None:
    absent, shapes, types = [], [], []
    for entity in wanted:
        name = name_of(entity)
        if not is_tensor(entity):
            absent += [] if name in found.objects else [name]
            continue
        tensor = found.tensors.get(name)
        if tensor is None:
            absent.append(name)
            continue
        shape = tuple(entity.global_shape)
        fits = len(shape) == tensor.ndim if entity.allow_shape_mismatch else shape == tensor.shape
        if not fits:
            shapes.append(f"{name}: {tensor.shape} in the checkpoint, {shape} in the state")
        if not cast and _name(entity.dtype) != tensor.dtype.name:
            types.append(f"{name}: {tensor.dtype.name} in the checkpoint, {_name(entity.dtype)} in the state")
    told = []
    if absent:
        told.append(f"{len(set(absent))} that the checkpoint has not: {few(sorted(set(absent)), _SHOWN)}")
    if shapes:
        told.append(f"{len(set(shapes))} of another shape: {few(sorted(set(shapes)), _SHOWN)}")
    if types:
        told.append(f"{len(set(types))} of another type: {few(sorted(set(types)), _SHOWN)}")
    if told:
        raise MappingError(
            "the checkpoint has not what the state asks for",
            path=found.path,
            found="; ".join(told),
            remedy="build the model that was saved"
            + (", or pass strictness='log_unexpected' to go on without" if absent else "")
            + (", or cast=True to round" if types else ""),
        )


def _targets(entity: Any, data: torch.Tensor, source: LazyTensor) -> Iterable[Target]:
    described = WithData(entity, data)
    for piece in pieces_of(described):
        stops = [
            min(begin + length, whole)
            for begin, length, whole in zip(piece.offset, piece.sizes, source.shape, strict=True)
        ]
        sizes = tuple(max(0, stop - begin) for begin, stop in zip(piece.offset, stops, strict=True))
        if 0 in sizes:
            continue
        tensor = piece.tensor
        for axis, length in enumerate(sizes):
            tensor = tensor.narrow(axis, 0, length)
        yield Target(piece.name, source.box(piece.offset, sizes), tensor)


def _object(thawing: Thawing, value: Any, name: str, path: str) -> Any:
    try:
        return thawing.object(value)
    except AnyckptError as error:
        error.path, error.tensor = error.path or path, error.tensor or name
        raise


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
