"""Matrices whose rows a model brings to length 1 before it uses them, as Baichuan 2 does with its output layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anyckpt.config.model import ModelConfig
from anyckpt.errors import MappingError
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.models.language.rule_operations import Operation
from anyckpt.storage.gather import SCRATCH_BYTES, hole, is_hole, scratch
from anyckpt.tensor import LazyTensor, View, as_numbers

_SMALLEST = 1e-12  # of a length that is divided by: torch.nn.functional.normalize's


class RowsOfLengthOne(View):
    """A matrix with each row divided by its length, in float64, and rounded once.

    A row whose length is 1 as nearly as its type can say stays as it is, so that nothing changes a second time; so
    does a row of zeros.

    Args:
        child: (rows, columns), of a floating-point type that numpy computes with.
    """

    __slots__ = ()

    def identity(self) -> Identity:
        return (self.child,)

    def read_box(self, start: Shape, out: Array) -> None:
        columns = self.shape[1]
        if is_hole(out):
            self.child.read_box((start[0], 0), hole((out.shape[0], columns), self.dtype.raw))
            return
        step = max(1, SCRATCH_BYTES // max(1, 8 * columns))
        for at in range(0, out.shape[0], step):
            count = min(step, out.shape[0] - at)
            with scratch(count * columns * self.dtype.itemsize) as buffer:
                raw = buffer.view(self.dtype.raw).reshape(count, columns)
                self.child.read_box((start[0] + at, 0), raw)
                self._divide(raw)
                out[at : at + count] = raw[:, start[1] : start[1] + out.shape[1]]

    def _divide(self, raw: Array) -> None:
        """Rows of raw elements, in place."""
        values = as_numbers(raw, self.dtype)
        wide = values.astype(np.float64)
        lengths = np.sqrt(np.add.reduce(np.square(wide), axis=1))
        apart = np.abs(lengths - 1) > _precision(values)
        if apart.any():
            wide[apart] /= np.maximum(lengths[apart], _SMALLEST)[:, None]
            values[apart] = wide[apart].astype(values.dtype)


def _precision(values: Array) -> float:
    """Distance from 1 to the next number of the array's type."""
    one = np.ones(1, values.dtype)
    above = one.view(f"<u{values.dtype.itemsize}") + 1
    return float(above.astype(f"<u{values.dtype.itemsize}").view(values.dtype)[0]) - 1


class UnitRows(Operation):
    """The same tensor, with rows of length 1 in the hub where the model's own code computes with such rows.

    Args:
        when: whether a model's does.
    """

    def __init__(self, when: Callable[[ModelConfig], bool]) -> None:
        self._when = when

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        source = sources[0]
        if not self._when(config) or source.ndim != 2:
            return source
        if source.dtype.kind != "float" or source.dtype.numpy is None:
            raise MappingError(
                "this family's rows are brought to length 1, which their type does not allow",
                expected="floating-point weights",
                found=source.dtype.name,
            )
        return RowsOfLengthOne(source)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [tensor]

    def remark(self, config: ModelConfig) -> str | None:
        if not self._when(config):
            return None
        return (
            "the model's own code brings rows to length 1 before it uses them and Megatron does not: they go to "
            "Megatron with length 1, and what Megatron trained is exact as --family llama"
        )
