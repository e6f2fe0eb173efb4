"""An adapter in the hub: low-rank updates of the hub's weights, whatever wrote them.

An update belongs to a weight of the hub (``decoder.layers.3.self_attention.linear_qkv.weight``), and either to all of
its rows, which are then in the hub's order (Megatron's fused form), or to one of its parts, rows as Hugging Face has
them (the canonical form): ``q``, ``k``, ``v`` of a fused QKV, ``gate`` and ``up`` of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import NamedTuple

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError, few
from anyckpt.tensor import LazyTensor, concatenate


class Target(NamedTuple):
    """What an update changes: a weight of the hub, and a part of its rows (empty for all of them)."""

    weight: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.weight} ({self.part})" if self.part else self.weight


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down``.

    Attributes:
        down: (rank, in), LoRA's A.
        up: (out, rank), LoRA's B.
        scale: alpha over rank, or over its square root.
        magnitude: (out,), DoRA's lengths of rows; None for plain LoRA.
        bias: (out,), LoRA's own bias of B; None mostly.
        names: as stored, for messages.
    """

    down: LazyTensor
    up: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None
    names: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Rows:
    """Rows that take the place of a matrix's.

    Attributes:
        indices: which.
        values: (indices, width), in their order.
        name: as stored, for messages.
    """

    indices: tuple[int, ...]
    values: LazyTensor
    name: str

    def put_into(self, matrix: LazyTensor, target: DType) -> LazyTensor:
        """The matrix with these rows, cast.

        Raises:
            MappingError: it has another width, or not all of the rows.
        """
        if self.values.ndim != 2 or matrix.ndim != 2 or self.values.shape[1] != matrix.shape[1]:
            raise MappingError(
                "trained rows have another width than the base model's",
                tensor=self.name,
                expected=matrix.shape[1:],
                found=self.values.shape,
            )
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        if len(set(self.indices)) != len(self.indices) or len(self.indices) != self.values.shape[0]:
            raise MappingError(
                "the adapter's settings and tensors contradict each other on the trained tokens",
                tensor=self.name,
                expected=f"{self.values.shape[0]} different tokens",
                found=f"{len(set(self.indices))}",
            )
        if self.indices and not 0 <= self.indices[order[0]] <= self.indices[order[-1]] < matrix.shape[0]:
            raise MappingError(
                "trains tokens that the base model does not have",
                tensor=self.name,
                expected=f"tokens below {matrix.shape[0]}",
                found=str(self.indices[order[-1]]),
                remedy="resize the base model's vocabulary as it was resized for training",
            )
        pieces: list[LazyTensor] = []
        at = 0
        for number in order:
            row = self.indices[number]
            pieces += [matrix.narrow(0, at, row - at).cast(target), self.values.narrow(0, number, 1).cast(target)]
            at = row + 1
        pieces.append(matrix.narrow(0, at, matrix.shape[0] - at).cast(target))
        return concatenate([piece for piece in pieces if piece.shape[0]], 0)


@dataclass
class Adapter:
    """Everything that an adapter changes.

    Attributes:
        updates: by what they change, in stored order.
        replaced: what takes the place of whole tensors of the base (PEFT's ``modules_to_save``, trained biases): hub
            name -> which of its rule's sources -> the family's own tensor.
        rows: what takes the place of single rows (PEFT's trainable tokens), in the same way.
        notes: what a user should know.
    """

    updates: dict[Target, LowRank]
    replaced: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    rows: dict[str, dict[int, Rows]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def put(updates: dict[Target, LowRank], target: Target, update: LowRank) -> None:
    """Add an update.

    Raises:
        MappingError: there is one of the same rows.
    """
    if target in updates:
        other = updates[target].names[0]
        raise MappingError("adapts a weight that another tensor adapts", tensor=update.names[0], found=other)
    updates[target] = update


def by_weight(adapter: Adapter) -> dict[str, dict[str, LowRank]]:
    """Updates by the weight that they change, and by its part.

    Raises:
        MappingError: a weight is adapted as a whole and in parts.
    """
    grouped: dict[str, dict[str, LowRank]] = {}
    for target, update in adapter.updates.items():
        grouped.setdefault(target.weight, {})[target.part] = update
    for parts in grouped.values():
        if "" in parts and len(parts) > 1:
            raise MappingError(
                "adapts a weight as a whole and in parts",
                tensor=(parts[""].names or ("",))[0],
                found=few(name for part in parts if part for name in parts[part].names),
            )
    return grouped


def all_equal(tensors: Sequence[LazyTensor]) -> bool:
    """Whether tensors have the same elements; reads them."""
    first = tensors[0]
    return all(
        other.shape == first.shape
        and all(a.tobytes() == b.tobytes() for a, b in zip(first.chunks(), other.chunks(), strict=True))
        for other in tensors[1:]
    )


def is_zero(tensor: LazyTensor) -> bool:
    """Whether all elements are; reads up to the first that is not."""
    return all(not np.count_nonzero(chunk) for chunk in tensor.chunks())


def check_vectors(update: LowRank, name: str) -> None:
    """Raise MappingError unless lengths of rows and a bias are of as many rows as the update."""
    rows = update.up.shape[0]
    for vector in (update.magnitude, update.bias):
        if vector is not None and vector.shape != (rows,):
            raise MappingError(
                "has another length than the weight has rows", tensor=name, expected=(rows,), found=vector.shape
            )


def check_factors(update: LowRank, name: str) -> None:
    """Check that the two factors can be multiplied.

    Raises:
        MappingError: they cannot.
    """
    down, up = update.down, update.up
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.size or not up.size:
        raise MappingError(
            "the two factors of an update do not fit together",
            tensor=name,
            expected="(rank, in) and (out, rank) of one rank",
            found=f"{down.shape} and {up.shape}",
        )
    if not down.dtype.is_floating or not up.dtype.is_floating or down.dtype.numpy is None or up.dtype.numpy is None:
        raise MappingError(
            "an adapter's factor is not of floating-point numbers",
            tensor=name,
            found=f"{down.dtype.name} and {up.dtype.name}",
        )
