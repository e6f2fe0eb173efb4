"""Quantized weights that are more than codes times scales: zero points, columns in another order, tables of numbers.

From AutoAWQ 0.2.9 (``WQLinear_GEMM``), GPTQModel 7.7 (``TorchLinear.dequantize_weight``), bitsandbytes 0.50
(``Linear4bit``, ``Linear8bitLt``), compressed-tensors 0.20 (``PackedQuantizationCompressor``) and NVIDIA ModelOpt 0.40.
MLX's are in ``mlx``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import MappingError
from anyckpt.indexing import Array, Shape
from anyckpt.quantization.affine import Affine, Columns, Gathered, Numbers, OfTable, Raised, Shares, Unpacked
from anyckpt.quantization.nodes import Halved, Repeated, numbers_of, scaled
from anyckpt.tensor import Constant, LazyTensor, Mapped

Parts = Mapping[str, LazyTensor]

_BYTE, _FLOAT32 = dtype("uint8"), dtype("float32")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of eight columns, which four bits of a word it is, from the least on."""

_INT8_STEP = 7.874015718698502e-3
"""1/127 in float32, as bitsandbytes multiplies by it (``int8_vectorwise_dequant``)."""

_SCALES = ("scales", "weight_scale", "weight.absmax", "weight.nested_absmax", "SCB")

_JSON_LIMIT = 1 << 16
_USUAL_GROUP = 128


@dataclass(frozen=True)
class Assembled:
    """How a quantized weight is stored that has more parts than codes and scales.

    Attributes:
        codes: what follows the module's name in that of its codes.
        needed: the same of the parts that are always there; of one that ends in ``*``, the beginning.
        optional: of those that may be.
        kind: element type of the codes.
        make: the weight in numbers of a type, of its parts by what follows the module's name.
        numbers: what the codes are, for messages.
        weight: what follows the module's name in that of the weight.
        of: whether a module's weight is stored so, by its name.
    """

    codes: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    kind: str
    make: Callable[[Parts, DType], LazyTensor]
    numbers: str
    weight: str = "weight"
    of: Callable[[str], bool] = lambda module: True

    @property
    def of_scales(self) -> tuple[str, ...]:
        """How names of scales end."""
        return tuple(f".{part}" for part in (*self.needed, *self.optional) if part in _SCALES)

    def parts(self, name: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | None:
        """A weight's parts, if ``name`` is that of its codes and none is missing."""
        stem = name.removesuffix(self.codes)
        if stem == name or tensors[name].dtype.name != self.kind or not stem.endswith("."):
            return None
        if not self.of(stem[:-1]):
            return None
        found = {self.codes: tensors[name]}
        for part in self.needed:
            matching = (
                [part]
                if not part.endswith("*")
                else [other.removeprefix(stem) for other in tensors if other.startswith(stem + part[:-1])]
            )
            if len(matching) != 1 or stem + matching[0] not in tensors:
                return None
            found[matching[0]] = tensors[stem + matching[0]]
        return found | {part: tensors[stem + part] for part in self.optional if stem + part in tensors}


def fault(part: str, expected: object, found: object) -> MappingError:
    return MappingError(
        f"{part} does not fit the weight's codes",
        expected=expected,
        found=found,
        remedy="copy config.json and weight files again, from one revision of the model",
    )


def check_shape(part: str, tensor: LazyTensor, shape: Shape) -> LazyTensor:
    if tensor.shape != shape:
        raise fault(part, shape, tensor.shape)
    return tensor


def _product(
    codes: LazyTensor, zeros: LazyTensor | int, scales: LazyTensor, groups: Columns | None, to: DType
) -> LazyTensor:
    """(codes - zeros) * scales of ``[rows, columns]`` codes and ``[rows, groups]`` zeros and scales."""
    count = scales.shape[1]
    each = -(-codes.shape[1] // count)

    def spread(tensor: LazyTensor) -> LazyTensor:
        if groups is not None and count > 1:
            return Gathered(tensor, groups, codes.shape[1])
        return Repeated(tensor, (1, each), codes.shape)

    if isinstance(zeros, int):
        zero: LazyTensor = Constant(_BYTE, codes.shape, bytes([zeros]))
    else:
        zero = spread(zeros)
    return Mapped((codes, zero, spread(numbers_of(scales))), to, Affine(to))


@cache
def _signed(bits: int) -> Array:
    """The number of each code in two's complement, float32."""
    half = 1 << bits - 1
    return np.array([*range(half), *range(-half, 0)], np.float32)


def _order(stored: LazyTensor | None, columns: int, count: int) -> Columns | None:
    """The group of each column."""
    if stored is None:
        return None
    if stored.dtype.kind != "integer":
        raise fault("g_idx", "whole numbers", stored.dtype.name)
    return Columns(check_shape("g_idx", stored, (columns,)), count)


def gptq(bits: int, *, lowered: bool) -> Assembled:
    """GPTQ: codes packed along the inputs.

    Args:
        bits: of a code: 2, 4 or 8.
        lowered: one was taken from every zero point before they were stored, as GPTQ's first version does; from words
            of them at once, so that what a zero borrowed comes back when one is added.
    """

    def make(parts: Parts, to: DType) -> LazyTensor:
        words, scales, zeros = parts["qweight"], parts["scales"], parts["qzeros"]
        if words.ndim != 2 or scales.ndim != 2 or not scales.shape[0]:
            raise fault("scales", "matrices", f"{words.shape} and {scales.shape}")
        each, columns = 32 // bits, words.shape[0] * 32 // bits
        groups, rows = check_shape("scales", scales, (scales.shape[0], words.shape[1])).shape
        check_shape("qzeros", zeros, (groups, -(-rows // each)))
        codes = Unpacked(words, 0, bits).permute((1, 0))
        if lowered:
            zeros = Mapped((zeros,), zeros.dtype, Raised(sum(1 << bits * place for place in range(each))))
        zero = Unpacked(zeros, 1, bits).narrow(1, 0, rows).permute((1, 0))
        order = _order(parts.get("g_idx"), columns, groups)
        return _product(codes, zero, scales.permute((1, 0)), order, to)

    return Assembled("qweight", ("scales", "qzeros"), ("g_idx",), "int32", make, f"int{bits}")


def awq(*, zeros: bool) -> Assembled:
    """AutoAWQ's ``gemm``: four bits, packed along the outputs in an order of their own.

    Args:
        zeros: there are zero points.
    """

    def make(parts: Parts, to: DType) -> LazyTensor:
        words, scales = parts["qweight"], parts["scales"]
        if words.ndim != 2 or scales.ndim != 2 or not scales.shape[0]:
            raise fault("scales", "matrices", f"{words.shape} and {scales.shape}")
        rows = 8 * words.shape[1]
        check_shape("scales", scales, (scales.shape[0], rows))
        codes = Unpacked(words, 1, 4, _AWQ_ORDER).permute((1, 0))
        zero: LazyTensor | int = 8
        if "qzeros" in parts:
            stored = check_shape("qzeros", parts["qzeros"], (scales.shape[0], words.shape[1]))
            zero = Unpacked(stored, 1, 4, _AWQ_ORDER).permute((1, 0))
        return _product(codes, zero, scales.permute((1, 0)), None, to)

    needed, more = (("scales", "qzeros"), ()) if zeros else (("scales",), ("qzeros",))
    return Assembled("qweight", needed, more, "int32", make, "int4")


def packed(bits: int, *, zeros: bool) -> Assembled:
    """compressed-tensors' ``pack-quantized`` with zero points, or with columns whose groups are not in turn.

    Args:
        bits: of a code: 2, 4 or 8.
        zeros: there are zero points.
    """

    def make(parts: Parts, to: DType) -> LazyTensor:
        words, scales = parts["weight_packed"], parts["weight_scale"]
        stored = parts["weight_shape"]
        if stored.dtype.kind != "integer" or stored.shape != (2,) or words.ndim != 2:
            raise fault("weight_shape", "rows and columns", f"{stored.dtype.name} {stored.shape}")
        rows, columns = (int(n) for n in stored.numpy())
        each = 32 // bits
        check_shape("weight_packed", words, (rows, -(-columns // each)))
        if scales.ndim != 2 or not scales.size or scales.shape[0] != rows:
            raise fault("weight_scale", f"{rows} rows", scales.shape)
        codes = Unpacked(words, 1, bits).narrow(1, 0, columns)
        zero: LazyTensor | int = 1 << bits - 1
        if "weight_zero_point" in parts:
            packed_zeros = check_shape(
                "weight_zero_point", parts["weight_zero_point"], (-(-rows // each), scales.shape[1])
            )
            zero = Unpacked(packed_zeros, 0, bits).narrow(0, 0, rows)
        order = _order(parts.get("weight_g_idx"), columns, scales.shape[1])
        return _product(codes, zero, scales, order, to)

    needed = ("weight_scale", "weight_shape", *(("weight_zero_point",) if zeros else ()))
    return Assembled("weight_packed", needed, ("weight_zero_point", "weight_g_idx"), "int32", make, f"int{bits}")


def modelopt_int4(stated: int | None) -> Assembled:
    """ModelOpt's INT4 of AWQ: two rows in a byte; inputs may be multiplied by numbers that are taken into the weight.

    Of W4A8, the second scale is one that only kernels need.

    Args:
        stated: columns with one scale; None where the configuration leaves it to the scales, as ModelOpt's does.
    """

    def make(parts: Parts, to: DType) -> LazyTensor:
        pairs, scales = parts["weight"], parts["weight_scale"]
        if pairs.ndim != 2 or not pairs.size:
            raise fault("weight", "a matrix", pairs.shape)
        rows, columns = 2 * pairs.shape[0], pairs.shape[1]
        group = stated or _group_of(columns, scales)
        check_shape("weight_scale", scales, (rows, -(-columns // group)))
        return _smoothed(Halved(pairs, 0), _signed(4), scales, (1, group), parts, to)

    others = ("pre_quant_scale", "weight_scale_2")
    return Assembled("weight", ("weight_scale",), others, "uint8", make, "int4")


def _group_of(columns: int, scales: LazyTensor) -> int:
    """Columns with one scale, where there are so many scales in a row."""
    count = scales.shape[-1] if scales.ndim == 2 else 0
    return columns // count if count and columns % count == 0 else _USUAL_GROUP


def modelopt_int8() -> Assembled:
    """ModelOpt's INT8 of SmoothQuant: a scale for each row; inputs may be multiplied by numbers, as for INT4."""

    def make(parts: Parts, to: DType) -> LazyTensor:
        codes, scales = parts["weight"], parts["weight_scale"]
        if codes.ndim != 2 or not codes.size:
            raise fault("weight", "a matrix", codes.shape)
        column = check_shape("weight_scale", scales, (codes.shape[0],)).reshape((codes.shape[0], 1))
        return _smoothed(codes, _signed(8), column, (1, codes.shape[1]), parts, to)

    return Assembled("weight", ("weight_scale",), ("pre_quant_scale",), "int8", make, "int8")


def _smoothed(codes: LazyTensor, table: Array, scales: LazyTensor, block: Shape, parts: Parts, to: DType) -> LazyTensor:
    """Codes times scales, and times what the module's inputs are multiplied by, if they are."""
    inputs = parts.get("pre_quant_scale")
    if inputs is None:
        return scaled(codes, table, scales, block, to)
    rows, columns = codes.shape
    whole = scaled(codes, table, scales, block, _FLOAT32)
    check_shape("pre_quant_scale", inputs, (columns,))
    spread = Repeated(numbers_of(inputs).reshape((1, columns)), (rows, 1), codes.shape)
    return Mapped((whole, spread), _FLOAT32, np.multiply).cast(to)


def nf4() -> Assembled:
    """bitsandbytes' four bits: the codes of all rows in turn, two in a byte, the first in the high half."""

    def make(parts: Parts, to: DType) -> LazyTensor:
        stored, scales, table = parts["weight"], parts["weight.absmax"], parts["weight.quant_map"]
        state = _state(parts)
        shape, block = tuple(state["shape"]), state["blocksize"]
        size = math.prod(shape)
        if stored.size != -(-size // 2):
            raise fault("weight", f"{-(-size // 2)} bytes of {shape}", stored.shape)
        count = -(-size // block)
        check_shape("weight.absmax", scales, (count,))
        check_shape("weight.quant_map", table, (16,))
        flat = Unpacked(stored.reshape((stored.size,)), 0, 4, (1, 0)).narrow(0, 0, size)
        if "weight.nested_absmax" in parts:
            scales = _nested(scales, parts, state)
        spread = Repeated(numbers_of(scales), (block,), (size,))
        values = Mapped((flat, spread), _FLOAT32, OfTable(Numbers(table)))
        return values.cast(to).reshape(shape)

    more = ("weight.nested_absmax", "weight.nested_quant_map")
    needed = ("weight.absmax", "weight.quant_map", "weight.quant_state.*")
    return Assembled("weight", needed, more, "uint8", make, "4-bit numbers")


def int8_rows() -> Assembled:
    """bitsandbytes' eight bits: a scale for each row, of which a code is so many 127ths."""

    def make(parts: Parts, to: DType) -> LazyTensor:
        codes, scales = parts["weight"], parts["SCB"]
        if codes.ndim != 2:
            raise fault("weight", "a matrix", codes.shape)
        check_shape("SCB", scales, (codes.shape[0],))
        form = parts.get("weight_format")
        if form is not None and int(form.numpy().reshape(-1)[0]):
            raise fault("weight_format", "0: rows as they are", form.numpy().tolist())
        spread = Repeated(numbers_of(scales).reshape((codes.shape[0], 1)), (1, max(1, codes.shape[1])), codes.shape)
        return Mapped((codes, spread), to, Shares(to, _INT8_STEP))

    return Assembled("weight", ("SCB",), ("weight_format",), "int8", make, "int8")


def _nested(codes: LazyTensor, parts: Parts, state: Mapping[str, Any]) -> LazyTensor:
    """Scales that are quantized themselves."""
    size, block = codes.size, state["nested_blocksize"]
    scales, table = parts["weight.nested_absmax"], parts.get("weight.nested_quant_map")
    if table is None or codes.dtype.name != "uint8":
        raise fault("weight.nested_quant_map", "256 numbers, and codes in uint8", codes.dtype.name)
    check_shape("weight.nested_absmax", scales, (-(-size // block),))
    check_shape("weight.nested_quant_map", table, (256,))
    spread = Repeated(numbers_of(scales), (block,), (size,))
    return Mapped((codes, spread), _FLOAT32, OfTable(Numbers(table), state["nested_offset"]))


def _state(parts: Parts) -> dict[str, Any]:
    """What bitsandbytes says of a weight, as JSON in bytes."""
    name = next(part for part in parts if part.startswith("weight.quant_state."))
    tensor = parts[name]
    try:
        if tensor.nbytes > _JSON_LIMIT or tensor.dtype.name != "uint8":
            raise ValueError
        found = json.loads(tensor.numpy().tobytes())
        state = {
            "shape": found["shape"],
            "blocksize": found["blocksize"],
            "nested_blocksize": found.get("nested_blocksize", 256),
            "nested_offset": float(found.get("nested_offset", 0.0)),
        }
        numbers = [*state["shape"], state["blocksize"], state["nested_blocksize"]]
        if not all(type(n) is int and 0 < n < 1 << 40 for n in numbers) or not math.isfinite(state["nested_offset"]):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UnicodeDecodeError):
        raise fault(name, "JSON with shape and blocksize", f"{tensor.nbytes} bytes") from None
    return state
