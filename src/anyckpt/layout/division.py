"""Joining the ranks' parts of one tensor, and cutting one tensor into the ranks' parts; both are views."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from anyckpt.errors import MappingError
from anyckpt.layout.geometry import Geometry
from anyckpt.layout.partition import Division, Partition
from anyckpt.tensor import Constant, LazyTensor, concatenate

Padding = Literal["zeros", "repeat-last-row"]
"""What fills the rows behind the vocabulary: NeMo writes zeros, Megatron-LM's converter repeats the last row."""


def settled(name: str, part: LazyTensor, ways: int, how: Division) -> Division:
    """How a tensor is divided whose parts tell.

    Raises:
        MappingError: the part is neither the whole nor a rank's share of it.
    """
    if not how.either or how.rows is None:
        return how
    if part.ndim and part.shape[0] in (how.rows, how.rows / ways):
        return dataclasses.replace(how, axis=None if part.shape[0] == how.rows else 0, either=False)
    raise MappingError(
        "the files and the model's configuration disagree on this tensor",
        tensor=name,
        expected=f"{how.rows} rows by the configuration, or a share of {ways} ranks",
        found=part.shape,
    )


def join_parts(name: str, parts: Sequence[LazyTensor], how: Division, geometry: Geometry) -> LazyTensor:
    """The whole of the ranks' parts, in rank order; equal copies if the tensor is replicated.

    Raises:
        MappingError: the parts do not make up a tensor of this kind.
    """
    _check_alone(name, len(parts), how)
    if how.own is not None:
        return how.own.join(name, parts)
    first = parts[0]
    for rank, part in enumerate(parts):
        if part.dtype != first.dtype or part.shape != first.shape:
            raise MappingError(
                "tensor-parallel ranks hold parts of different types or shapes",
                tensor=name,
                expected=f"{first.dtype.name} {first.shape} as on rank 0",
                found=f"{part.dtype.name} {part.shape} on rank {rank}",
            )
    if how.axis is None:
        return first
    _check_axis(name, first, how)
    length = first.shape[how.axis] * len(parts)
    _check_rows(name, length, how)
    if len(parts) == 1:
        whole = first
    else:
        tiles, start = [], 0
        for block in _blocks(name, length, how):
            each = _share(name, block, len(parts))
            tiles += [part.narrow(how.axis, start, each) for part in parts]
            start += each
        whole = concatenate(tiles, how.axis)
    return _trimmed(name, whole, geometry) if how.vocabulary else whole


def cut_parts(
    name: str, tensor: LazyTensor, how: Division, ways: int, geometry: Geometry, padding: Padding
) -> list[LazyTensor]:
    """The parts of so many ranks, in rank order.

    Raises:
        MappingError: the tensor cannot be divided so.
    """
    _check_alone(name, ways, how)
    if how.own is not None:
        return _cut_by(how.own, name, tensor, ways)
    if how.either:
        how = dataclasses.replace(settled(name, tensor, 1, how), axis=how.axis)
    if how.axis is None:
        return [tensor] * ways
    _check_axis(name, tensor, how)
    _check_rows(name, tensor.shape[how.axis], how)
    if how.vocabulary:
        tensor = _padded(name, tensor, ways, geometry, padding)
    if ways == 1:
        return [tensor]
    tiles: list[list[LazyTensor]] = [[] for _ in range(ways)]
    start = 0
    for block in _blocks(name, tensor.shape[how.axis], how):
        each = _share(name, block, ways)
        for rank in range(ways):
            tiles[rank].append(tensor.narrow(how.axis, start + rank * each, each))
        start += block
    return [concatenate(parts, how.axis) for parts in tiles]


def _cut_by(own: Partition, name: str, tensor: LazyTensor, ways: int) -> list[LazyTensor]:
    """The parts by a family's way, which must make up the tensor again.

    Raises:
        MappingError: they are not as many as ranks, or do not.
    """
    parts = list(own.cut(name, tensor, ways))
    whole = own.join(name, parts) if len(parts) == ways else None
    if whole is None or whole.shape != tensor.shape or whole.dtype != tensor.dtype:
        made = f"{len(parts)} parts" if whole is None else f"{whole.dtype.name} {whole.shape} joined again"
        raise MappingError(
            f"{type(own).__name__}, by which the model's family divides it, does not divide this tensor",
            tensor=name,
            expected=f"{ways} parts of {tensor.dtype.name} {tensor.shape}",
            found=made,
            remedy="report it to whoever wrote the family",
        )
    return parts


def _check_alone(name: str, ways: int, how: Division) -> None:
    if how.alone and ways > 1:
        raise MappingError(
            "is of a module that its framework cannot divide over tensor-parallel ranks",
            tensor=name,
            expected="tensor parallel size 1",
            found=ways,
            remedy="choose --tp 1",
        )


def _check_axis(name: str, tensor: LazyTensor, how: Division) -> None:
    if how.axis is not None and tensor.ndim <= how.axis:
        raise MappingError(
            "has too few axes to be divided by its rule",
            tensor=name,
            expected=f"at least {how.axis + 1} axes",
            found=tensor.shape,
            remedy="check the rules file",
        )


def _check_rows(name: str, length: int, how: Division) -> None:
    """Raise MappingError if the whole axis is known to be of another length."""
    expected = sum(how.blocks) if isinstance(how.blocks, tuple) else how.rows
    if expected is not None and expected != length:
        raise MappingError(
            "the files and the model's configuration disagree on this tensor",
            tensor=name,
            expected=f"{expected} rows by the configuration",
            found=f"{length} rows in all",
        )


def _blocks(name: str, length: int, how: Division) -> Sequence[int]:
    """Lengths of the blocks of the whole axis."""
    if isinstance(how.blocks, tuple):
        return how.blocks
    return [_share(name, length, how.blocks)] * how.blocks


def _share(name: str, length: int, ways: int) -> int:
    if length % ways:
        raise MappingError(
            "cannot be divided evenly",
            tensor=name,
            expected=f"a multiple of {ways}",
            found=f"a length of {length}",
            remedy="choose another parallel size",
        )
    return length // ways


def _trimmed(name: str, whole: LazyTensor, geometry: Geometry) -> LazyTensor:
    """The vocabulary's rows, without padding where the true size is known."""
    stored, stated, true = whole.shape[0], geometry.padded_vocab_size, geometry.vocab_size
    if stated is not None and stated != stored:
        raise MappingError(
            "the files and the model's configuration disagree on the padded vocabulary",
            tensor=name,
            expected=f"{stated} rows by the configuration",
            found=f"{stored} rows in all",
        )
    if true is None:
        return whole
    _check_vocabulary(name, stored, true)
    return whole.narrow(0, 0, true)


def _padded(name: str, tensor: LazyTensor, ways: int, geometry: Geometry, padding: Padding) -> LazyTensor:
    """The rows that ranks divide; padding that the tensor has is kept as far as it reaches."""
    stored = tensor.shape[0]
    if geometry.vocab_size is not None:
        _check_vocabulary(name, stored, geometry.vocab_size)
    wanted = geometry.rows(stored, ways)
    if wanted <= stored:
        return tensor.narrow(0, 0, wanted)
    missing = (wanted - stored, *tensor.shape[1:])
    if padding == "zeros" or not stored:
        return concatenate([tensor, Constant(tensor.dtype, missing)], 0)
    return concatenate([tensor] + [tensor.narrow(0, stored - 1, 1)] * (wanted - stored), 0)


def _check_vocabulary(name: str, stored: int, true: int) -> None:
    if true > stored:
        raise MappingError(
            "the vocabulary is larger than the stored rows",
            tensor=name,
            expected=f"at least {true} rows",
            found=stored,
            remedy="give the true size with --vocab-size",
        )
