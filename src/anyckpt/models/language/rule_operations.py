"""What the operations of rules are: how tensors of a family become tensors of the hub, and back.

Interleaving query, key and value by group, joining gate and up, transposing: views of the stored bytes.  Scaling alone
computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.identity import ElementWise
from anyckpt.indexing import Shape
from anyckpt.tensor import LazyTensor, Mapped, concatenate


class Operation(ABC):
    """How the tensors of one side of a rule become those of the other; both ways are views."""

    @abstractmethod
    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        """The hub tensor; shapes have been checked."""

    @abstractmethod
    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        """The source tensors, in the order of the rule's patterns."""

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        """Shapes of the source tensors of a hub tensor of this shape: its own, if nothing else is said."""
        return [shape]

    parts: tuple[str, ...] = ()
    """How Megatron calls each of several sources where it knows them apart, as in adapters."""

    def on_rows(self) -> Operation | None:
        """The same operation on tensors that share only the weights' output features, as their axis 0; None if none.

        Such are the second factor of a low-rank update, (out, rank), and a norm per output feature, whatever the order
        in which the weights themselves are stored.
        """
        return None

    def rows_together(self) -> Operation | None:
        """How the rows of several sources lie in the hub's tensor, if ``on_rows`` changes values besides."""
        return self.on_rows()

    def of_part(self, number: int) -> Operation:
        """How the rows of one of several sources become those of its part of the hub's tensor."""
        return IDENTITY

    def remark(self, config: ModelConfig) -> str | None:
        """What a user should know of the values that this operation gives for such a model; None if they are exact."""
        return None


class RowWise(Operation):
    """An operation that is the same on whatever shares the weights' rows."""

    def on_rows(self) -> Operation | None:
        return self


class Identity(RowWise):
    """The same tensor under another name."""

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return sources[0]

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [tensor]


class Interleaved(RowWise):
    """Rows interleaved by query group: a group's heads of the first source, of the next, and so on.

    For weights and biases alike.
    """

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        groups, rest = config.num_query_groups, sources[0].shape[1:]
        grouped = [tensor.reshape((groups, tensor.shape[0] // groups, *rest)) for tensor in sources]
        return concatenate(grouped, 1).reshape((sum(tensor.shape[0] for tensor in sources), *rest))

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        groups, rest = config.num_query_groups, tensor.shape[1:]
        grouped = tensor.reshape((groups, tensor.shape[0] // groups, *rest))
        parts, start = [], 0
        for shape in self.source_shapes(tensor.shape, config):
            rows = shape[0] // groups
            parts.append(grouped.narrow(1, start, rows).reshape(shape))
            start += rows
        return parts


class InterleavedQueryKeyValue(Interleaved):
    """A group's query heads, its key head, its value head."""

    parts = ("q", "k", "v")

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        query = config.num_attention_heads * config.kv_channels
        key = config.num_query_groups * config.kv_channels
        return [(rows, *shape[1:]) for rows in (query, key, key)]


class InterleavedKeyValue(Interleaved):
    """A group's key head, then its value head (cross attention)."""

    parts = ("k", "v")

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2


class Halves(RowWise):
    """Two tensors of one shape, one after the other along axis 0: the gate and the up projection of a gated MLP."""

    parts = ("gate", "up")

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return concatenate(sources, 0)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        half = tensor.shape[0] // 2
        return [tensor.narrow(0, 0, half), tensor.narrow(0, half, half)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2


class ConcatenatedQueryKeyValue(RowWise):
    """One tensor that holds all query rows, then all key rows, then all value rows, interleaved by query group."""

    _separate = InterleavedQueryKeyValue()

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        parts, start = [], 0
        for shape in self._separate.source_shapes(sources[0].shape, config):
            parts.append(sources[0].narrow(0, start, shape[0]))
            start += shape[0]
        return self._separate.to_hub(parts, config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [concatenate(self._separate.from_hub(tensor, config), 0)]


class Transposed(Operation):
    """Another operation on matrices that are stored as (in, out), as transformers' ``Conv1D`` does.

    Args:
        inner: the operation on the transposed sources.
    """

    def __init__(self, inner: Operation) -> None:
        self._inner = inner

    def on_rows(self) -> Operation | None:
        return self._inner.on_rows()

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return self._inner.to_hub([tensor.transpose() for tensor in sources], config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [part.transpose() for part in self._inner.from_hub(tensor, config)]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [part[::-1] for part in self._inner.source_shapes(shape, config)]


class Leading(Operation):
    """The same elements with more or fewer leading axes of length one.

    Args:
        more: so many more has the hub tensor; negative for fewer.
    """

    def __init__(self, more: int) -> None:
        self._more = more

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return sources[0].reshape(self._with(sources[0].shape, self._more))

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [tensor.reshape(self._with(tensor.shape, -self._more))]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [self._with(shape, -self._more)]

    def _with(self, shape: Shape, more: int) -> Shape:
        return (1,) * more + shape[max(0, -more) :]


class Scaled(Operation):
    """Another operation on sources of which some are multiplied by a number.

    A power of two changes exponents alone, so both ways are exact.  By any other number values are multiplied (and
    divided on the way back) in float32, or float64 if they are that, and rounded to their own type.

    Args:
        inner: the operation on the multiplied sources.
        factor: the number, which may be 1 for some models.
        parts: which of the sources are multiplied.
    """

    def __init__(self, inner: Operation, factor: Callable[[ModelConfig], float], parts: tuple[int, ...] = (0,)) -> None:
        self._inner = inner
        self._factor = factor
        self._parts = parts
        self.parts = inner.parts

    def on_rows(self) -> Operation | None:
        inner = self._inner.on_rows()
        return None if inner is None else Scaled(inner, self._factor, self._parts)

    def rows_together(self) -> Operation | None:
        return self._inner.rows_together()

    def of_part(self, number: int) -> Operation:
        return Scaled(IDENTITY, self._factor) if number in self._parts else IDENTITY

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return self._inner.to_hub(self._changed(sources, config, np.multiply), config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return self._changed(self._inner.from_hub(tensor, config), config, np.divide)

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return self._inner.source_shapes(shape, config)

    def remark(self, config: ModelConfig) -> str | None:
        factor = self._factor(config)
        if abs(math.frexp(factor)[0]) == 0.5:
            return self._inner.remark(config)
        return f"Megatron's values are Hugging Face's times {factor:.6g}, rounded: not bit for bit the same either way"

    def _changed(
        self, tensors: Sequence[LazyTensor], config: ModelConfig, change: Callable[..., np.ndarray]
    ) -> list[LazyTensor]:
        factor = self._factor(config)
        if factor == 1:
            return list(tensors)
        return [changed_by(t, factor, change) if part in self._parts else t for part, t in enumerate(tensors)]


def changed_by(tensor: LazyTensor, factor: float, change: Callable[..., np.ndarray]) -> LazyTensor:
    """A tensor with ``Scale`` done to it.

    Raises:
        MappingError: it is of a type that numpy does not compute with.
    """
    if tensor.dtype.numpy is None:
        raise MappingError(
            "this family's values are scaled on the way, which their type does not allow",
            expected="floating-point weights",
            found=tensor.dtype.name,
        )
    return Mapped((tensor,), tensor.dtype, Scale(factor, change))


@dataclass(frozen=True)
class Scale(ElementWise):
    """``change(numbers, factor)``, computed in float32 (float64 for float64) and rounded to the numbers' own type.

    Attributes:
        factor: a number.
        change: ``numpy.multiply``, ``numpy.divide``, ``numpy.add`` or ``numpy.subtract``.
    """

    factor: float
    change: Callable[..., np.ndarray]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        wide = values.astype("<f8" if values.dtype == np.float64 else "<f4")
        with np.errstate(over="ignore"):
            result = self.change(wide, self.factor).astype(values.dtype)
        if np.isinf(result).any() and not np.isinf(values).any():
            raise MappingError(
                "a weight is too large to be scaled in its type",
                expected=f"less than {values.dtype.name}'s largest",
                found=f"{float(np.abs(wide).max()):.4g}",
                remedy="cast to bf16 or fp32 before",
            )
        return result


IDENTITY = Identity()
INTERLEAVED_QKV = InterleavedQueryKeyValue()
INTERLEAVED_KV = InterleavedKeyValue()
CONCATENATED_QKV = ConcatenatedQueryKeyValue()
GATE_UP = Halves()
TRANSPOSED = Transposed(IDENTITY)
TRANSPOSED_CONCATENATED_QKV = Transposed(CONCATENATED_QKV)
