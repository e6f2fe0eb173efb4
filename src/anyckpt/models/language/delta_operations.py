"""Operations of gated attention and of gated delta nets (Qwen3-Next and after): views, but for one norm.

As Megatron-Core 0.16's ``attention`` and ``ssm.gated_delta_net`` have their rows, and Megatron-Bridge 0.6.2 makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anyckpt.config.model import ModelConfig
from anyckpt.indexing import Shape
from anyckpt.models.language.rule_operations import Interleaved, Operation, RowWise, changed_by
from anyckpt.tensor import LazyTensor, concatenate

Lengths = Callable[[ModelConfig], Sequence[int]]


class GatedQueryKeyValue(Interleaved):
    """Query, key and value interleaved by group, each query head with a gate of its width behind it.

    Hugging Face's rows are a head's query, then its gate; a group's in Megatron are those of all its queries, of all
    their gates, of its key and of its value.
    """

    parts = ("q", "k", "v")

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        query, *others = sources
        return super().to_hub([_turned(query, config, self._by_head(config)), *others], config)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        query, *others = super().from_hub(tensor, config)
        heads = config.num_attention_heads // config.num_query_groups
        return [_turned(query, config, (config.num_query_groups, 2, heads)), *others]

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        query = 2 * config.num_attention_heads * config.kv_channels
        key = config.num_query_groups * config.kv_channels
        return [(rows, *shape[1:]) for rows in (query, key, key)]

    @staticmethod
    def _by_head(config: ModelConfig) -> tuple[int, int, int]:
        return config.num_query_groups, config.num_attention_heads // config.num_query_groups, 2


def _turned(tensor: LazyTensor, config: ModelConfig, counts: tuple[int, int, int]) -> LazyTensor:
    """Rows in blocks of a head's width with the second and third of their three numbers exchanged."""
    groups, second, third = counts
    apart = tensor.reshape((groups, second, third, config.kv_channels, *tensor.shape[1:]))
    return apart.permute((0, 2, 1, *range(3, apart.ndim))).reshape(tensor.shape)


class Joined(RowWise):
    """Tensors one after the other along axis 0.

    Args:
        lengths: how many rows each of them has.
    """

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return concatenate(sources, 0)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return _apart(tensor, self._lengths(config))

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(rows, *shape[1:]) for rows in self._lengths(config)]


class JoinedByHead(RowWise):
    """Tensors that have rows of several kinds by head, as rows of each kind one after the other.

    Args:
        kinds: for each tensor, the rows of its kinds in all heads together.
        heads: how many heads there are.
    """

    def __init__(self, kinds: Callable[[ModelConfig], Sequence[Sequence[int]]], heads: Callable[[ModelConfig], int]):
        self._kinds = kinds
        self._heads = heads

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        heads, parts = self._heads(config), []
        for tensor, rows in zip(sources, self._kinds(config), strict=True):
            by_head, start = tensor.reshape((heads, tensor.shape[0] // heads, *tensor.shape[1:])), 0
            for count in rows:
                each = count // heads
                parts.append(by_head.narrow(1, start, each).reshape((count, *tensor.shape[1:])))
                start += each
        return concatenate(parts, 0)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        heads, result, rest = self._heads(config), [], tensor.shape[1:]
        kinds = self._kinds(config)
        parts = iter(_apart(tensor, [count for rows in kinds for count in rows]))
        for rows in kinds:
            own = [next(parts).reshape((heads, count // heads, *rest)) for count in rows]
            result.append(concatenate(own, 1).reshape((sum(rows), *rest)))
        return result

    def source_shapes(self, shape: Shape, config: ModelConfig) -> Sequence[Shape]:
        return [(sum(rows), *shape[1:]) for rows in self._kinds(config)]


def _apart(tensor: LazyTensor, lengths: Sequence[int]) -> list[LazyTensor]:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return [tensor.narrow(0, start, length) for start, length in zip(starts, lengths, strict=True)]


class ZeroCentred(Operation):
    """A norm stored as gamma that Megatron-Core has as gamma - 1.

    Computed in float32 (float64 for that) and rounded to the tensor's type: exact, both ways, from 0.5 to 2.
    """

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return changed_by(sources[0], 1.0, np.subtract)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [changed_by(tensor, 1.0, np.add)]

    def remark(self, config: ModelConfig) -> str | None:
        return (
            "Megatron's values are Hugging Face's less 1, rounded: beyond 0.5 to 2 not bit for bit the same either way"
        )


ZERO_CENTRED = ZeroCentred()
GATED_QKV = GatedQueryKeyValue()
