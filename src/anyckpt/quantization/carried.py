"""Codes and scales of one form in another, none of them computed.

TensorRT-LLM has two algorithms whose weights other software writes too: 8-bit floats with a scale for each row
(``FP8_PER_CHANNEL_PER_TOKEN``; compressed-tensors' dynamic FP8, ModelOpt's), and 4-bit integers with one for each group
of a row (``W4A16_AWQ``; compressed-tensors' symmetric ``pack-quantized``).  A scale of a whole weight is none of them:
query, key and value become one weight, and their scales differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import UsageError
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.quantization.nodes import Repeated, numbers_of
from anyckpt.quantization.weights import Separated
from anyckpt.storage.gather import SCRATCH_BYTES, hole, is_hole, scratch
from anyckpt.tensor import Constant, LazyTensor, View


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
    ones = np.ones(1, dtype(kind).numpy).tobytes()
    return {
        "weight": PackedRows(codes),
        "weights_scaling_factor": Sampled(scales, way.group),
        "prequant_scaling_factor": Constant(dtype(kind), (columns,), ones),
    }


class PackedRows(View):
    """Two rows of 4-bit codes in one of bytes, the even one in the low half.

    Args:
        child: one code in a byte, counted from -8 on, ``[rows, columns]``; here they are two's complement.
    """

    __slots__ = ()

    def __init__(self, child: LazyTensor) -> None:
        self.child = child
        self.dtype = dtype("int8")
        self.shape = (child.shape[0] // 2, child.shape[1])

    def identity(self) -> Identity:
        return (self.child,)

    def read_box(self, start: Shape, out: Array) -> None:
        begin, shape = (2 * start[0], start[1]), (2 * out.shape[0], out.shape[1])
        if is_hole(out):
            self.child.read_box(begin, hole(shape, self.child.dtype.raw))
            return
        with scratch(math.prod(shape)) as buffer:
            codes = buffer.reshape(shape)
            self.child.read_box(begin, codes)
            np.bitwise_xor(codes, 8, out=codes)
            np.left_shift(codes[1::2], 4, out=out)
            np.bitwise_or(out, codes[::2], out=out)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        return PackedRows(self.child.box((2 * start[0], start[1]), (2 * shape[0], shape[1])))


class Sampled(View):
    """The first of every ``step`` columns, which stands for the others.

    Args:
        child: ``[rows, columns]``, of which ``step`` columns after one another are equal.
        step: divides the columns.
    """

    __slots__ = ("step",)

    def __init__(self, child: LazyTensor, step: int) -> None:
        self.child = child
        self.step = step
        self.dtype = child.dtype
        self.shape = (child.shape[0], child.shape[1] // step)

    def identity(self) -> Identity:
        return self.child, self.step

    def read_box(self, start: Shape, out: Array) -> None:
        first, width = start[1] * self.step, out.shape[1] * self.step
        if is_hole(out):
            self.child.read_box((start[0], first), hole((out.shape[0], width), self.dtype.raw))
            return
        rows = max(1, SCRATCH_BYTES // max(1, width * self.dtype.itemsize))
        for row in range(0, out.shape[0], rows):
            some = out[row : row + rows]
            with scratch(some.shape[0] * width * self.dtype.itemsize) as buffer:
                wide = buffer.view(self.dtype.raw).reshape((some.shape[0], width))
                self.child.read_box((start[0] + row, first), wide)
                some[...] = wide[:, :: self.step]

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        child = self.child.box((start[0], start[1] * self.step), (shape[0], shape[1] * self.step))
        return Sampled(child, self.step)
