"""Codes and scales of one form in another, none of them computed.

TensorRT-LLM has two algorithms whose weights other software writes too: 8-bit floats with a scale for each row
(``FP8_PER_CHANNEL_PER_TOKEN``; compressed-tensors' dynamic FP8, ModelOpt's), and 4-bit integers with one for each group
of a row (``W4A16_AWQ``; compressed-tensors' symmetric ``pack-quantized``).  A scale of a whole weight is none of them:
query, key and value become one weight, and their scales differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from anyckpt.dtypes import dtype
from anyckpt.errors import UsageError
from anyckpt.identity import ElementWise
from anyckpt.indexing import Array
from anyckpt.quantization.nodes import Repeated, numbers_of
from anyckpt.quantization.weights import Separated
from anyckpt.tensor import Constant, LazyTensor, Mapped


@dataclass(frozen=True)
class Way:
    """How weights of one kind are stored in another form.

    Attributes:
        algorithm: of ``forms``, in whose form and by whose facts they are stored.
        numbers: what codes are.
        group: columns with one scale; None for all of a row.
    """

    algorithm: str
    numbers: str
    group: int | None


def way_of(weights: Iterable[Separated], path: str) -> Way:
    """The way that all of these weights go.

    Raises:
        UsageError: there is none.
    """
    kinds = {(each.numbers, _group(each)) for each in weights}
    if len(kinds) == 1:
        numbers, group = kinds.pop()
        if numbers == "float8" and group == 0:
            return Way("fp8_per_channel", numbers, None)
        if numbers == "packed int4" and group:
            return Way("int4", numbers, group)
    raise UsageError(
        "its quantized weights are stored in no way that TensorRT-LLM has",
        path=path,
        expected="8-bit floats with a scale for each row, or symmetric 4-bit integers with one for each group of a row",
        remedy="quantize them again from numbers: add --dtype bf16, and --quantize with an algorithm",
    )


def _group(weight: Separated) -> int | None:
    """Columns with one scale; 0 for all of a row, None where a scale is of several rows."""
    *rows, columns = weight.block
    if weight.codes.ndim != 2 or any(size > 1 for size in rows):
        return None
    return 0 if columns == weight.codes.shape[1] else columns


def spread(weight: Separated) -> LazyTensor:
    """Every code's scale, float32."""
    return Repeated(numbers_of(weight.scales), weight.block, weight.codes.shape)


def parts(codes: LazyTensor, scales: LazyTensor, way: Way, kind: str) -> dict[str, LazyTensor]:
    """What follows a module's name in TensorRT-LLM's names -> the tensor.

    Args:
        codes: one in a byte, ``[rows, columns]``.
        scales: every code's.
        way: how they are stored.
        kind: element type of what is not quantized.

    Raises:
        UsageError: two rows of 4-bit integers share a byte, and there is an odd number; or the codes are of experts, of
            which it is not known how they are stored so.
    """
    if codes.ndim != 2:
        raise UsageError(
            "experts are stored in no known way so",
            expected="a matrix",
            found=codes.shape,
            remedy="quantize them again from numbers: add --dtype bf16, and --quantize fp8 or int4",
        )
    rows, columns = codes.shape
    if way.group is None:
        return {"weight": codes, "per_channel_scale": scales.narrow(1, 0, 1).reshape((rows,))}
    if rows % 2:
        raise UsageError("two rows of 4-bit integers share a byte", expected="an even number of rows", found=rows)
    pairs = codes.reshape((rows // 2, 2, columns))
    halves = tuple(pairs.narrow(1, half, 1).reshape((rows // 2, columns)) for half in range(2))
    groups = scales.reshape((rows, columns // way.group, way.group)).narrow(2, 0, 1)
    ones = np.ones(1, dtype(kind).numpy).tobytes()
    return {
        "weight": Mapped(halves, dtype("int8"), PackedRows()),
        "weights_scaling_factor": groups.reshape((rows, columns // way.group)),
        "prequant_scaling_factor": Constant(dtype(kind), (columns,), ones),
    }


@dataclass(frozen=True)
class PackedRows(ElementWise):
    """Two codes in a byte, of 4 bits that count from -8 on, as two's complement, the first in the low half."""

    def __call__(self, low: Array, high: Array) -> Array:
        packed: Array = ((low.view("u1") ^ 8) | ((high.view("u1") ^ 8) << 4)).view(np.int8)
        return packed
