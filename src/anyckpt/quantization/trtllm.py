"""TensorRT-LLM's quantized weights as numbers: codes, scales, and what inputs are multiplied by before the layer.

Facts: files of NVIDIA ModelOpt 0.17 and 0.40, and TensorRT-LLM's loaders.  A layer ``m`` has ``m.weight`` and
``m.weights_scaling_factor`` (of FP8 by rows ``m.per_channel_scale``).  Two 4-bit integers share a byte with the same
column of the next row, the even row in the low half; two 4-bit floats are neighbours in a row.  Where inputs are
multiplied by ``m.prequant_scaling_factor``, the weight was divided by it.  Older files call 8-bit floats int8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import MappingError
from anyckpt.indexing import Array, Shape, in_cache, look_up
from anyckpt.quantization.methods import Facts, Scheme
from anyckpt.quantization.nodes import Halved, Repeated, numbers_of, product, scaled
from anyckpt.quantization.numbers import table_of
from anyckpt.storage.gather import scratch
from anyckpt.tensor import LazyTensor, Mapped
from anyckpt.tensor.views import ElementWiseInto

METHOD = "trtllm"
"""As ``quant_method`` says it."""

_WEIGHT = ".weight"
PREQUANT = ".prequant_scaling_factor"
OF_ACTIVATIONS = (
    ".activation_scaling_factor",
    "_cache_scaling_factor",
    ".quantization_scaling_factor",
    ".act_scale",
    ".scale_to_int",
)
_WEIGHT_ONLY = ("W8A16", "W4A16")
_UNNEEDED = "the scale of a quantized activation, which a model in full precision does not have"
_PARTS = (".weights_scaling_factor", ".weights_scaling_factor_2", ".per_channel_scale", ".zero", ".alpha", ".smoother")
_PREQUANT_TYPES = ("float16", "bfloat16", "float32")
_REMEDY = "copy config.json and the ranks' files again, of one export"

Tensors = dict[str, LazyTensor]


def numbers(
    tensors: Mapping[str, LazyTensor], facts: Facts, schemes: tuple[Scheme, ...], to: str, path: str
) -> tuple[Tensors, dict[str, int], dict[str, str]]:
    """Weights as numbers; nothing is read.

    Args:
        tensors: whole tensors by TensorRT-LLM's names.
        facts: what ``config.json`` says of quantization.
        schemes: how weights may be stored.
        to: ``bfloat16``, ``float16`` or ``float32``.
        path: of the checkpoint, for messages.

    Returns:
        Tensors under their names, "int4 -> bfloat16" -> number of weights, and left-out names with the reason.

    Raises:
        MappingError: scales or codes are missing, or scales do not fit their codes.
    """
    made: Tensors = {}
    casts: Counter[str] = Counter()
    ignored: dict[str, str] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith(OF_ACTIVATIONS):
            ignored[name] = _UNNEEDED
        elif name.endswith(_WEIGHT) and tensor.dtype.itemsize == 1:
            stem = name.removesuffix(_WEIGHT)
            found = Quantized.of(stem, tensors, facts, schemes, path)
            made[name] = found.numbers(to)
            casts[f"{found.kind} -> {to}"] += 1
            used |= found.parts
        else:
            made[name] = tensor
    for name in list(made):
        if name in used:
            del made[name]
        elif name.endswith((*_PARTS, PREQUANT)):
            raise MappingError(
                "is part of a quantized weight whose other parts are missing or of other types",
                path=path,
                tensor=name,
                remedy=_REMEDY,
            )
    return made, dict(casts), ignored


@dataclass(frozen=True)
class Quantized:
    """One weight's codes with their scales.

    Attributes:
        codes: one in a byte, ``[..., rows, columns]``.
        scales: as many axes, one for each block.
        block: codes along each axis that one scale is of.
        table: the number of each code, float32.
        kind: of a code, for messages.
        parts: names of the tensors that it is made of, but for the codes.
        inputs: what the layer's inputs are multiplied by, with as many axes as the codes; None if they are not.
    """

    codes: LazyTensor
    scales: LazyTensor
    block: Shape
    table: Array
    kind: str
    parts: frozenset[str]
    inputs: LazyTensor | None = None

    @classmethod
    def of(
        cls, stem: str, tensors: Mapping[str, LazyTensor], facts: Facts, schemes: tuple[Scheme, ...], path: str
    ) -> Quantized:
        """The parts of the weight of a module.

        Raises:
            MappingError: they do not fit one another.
        """
        stored = tensors[stem + _WEIGHT]
        if f"{stem}.per_channel_scale" in tensors and facts.get("quant_algo") in _WEIGHT_ONLY:
            raise MappingError(
                "lies in the order in which a GPU's kernels read it, which differs between them",
                path=path,
                tensor=stem + _WEIGHT,
                expected=f"rows as the model has them, beside {stem}.weights_scaling_factor",
                remedy="convert the model from what it was quantized from",
            )
        scheme = next((each for each in schemes if _fits(stored, stem, each, tensors)), None)
        if scheme is None:
            raise MappingError(
                "is a quantized weight without the scales of its algorithm",
                path=path,
                tensor=stem + _WEIGHT,
                expected=" or ".join(dict.fromkeys(stem + each.scales for each in schemes)),
                found=f"{stored.dtype.name}, beside {_beside(stem, tensors)}",
                remedy=_REMEDY,
            )
        codes = _separate(stored, scheme)
        scales = tensors[stem + scheme.scales]
        arranged, block = _arranged(codes.shape, scales)
        stated = facts.get("group_size") if scheme.block is not None else None
        if arranged is None or (type(stated) is int and stated > 0 and block[-1] != min(stated, codes.shape[-1])):
            raise MappingError(
                "scales do not fit the weight's codes",
                path=path,
                tensor=stem + scheme.scales,
                expected=_expected(codes.shape, scheme, stated),
                found=scales.shape,
                remedy=_REMEDY,
            )
        parts = {stem + suffix for suffix in (scheme.scales, scheme.common) if suffix}
        if scheme.common:
            arranged = product(arranged, _common(stem + scheme.common, tensors, codes.shape, path))
        elif f"{stem}.weights_scaling_factor_2" in tensors:
            parts.add(f"{stem}.weights_scaling_factor_2")  # of W4A8, by which only the engine divides the others
        inputs = tensors.get(stem + PREQUANT)
        if inputs is not None:
            parts.add(stem + PREQUANT)
            inputs = _of_inputs(stem + PREQUANT, inputs, codes.shape, path)
        table = _table(scheme, stored.dtype)
        kind = {"packed int4": "int4", "float8": "float8_e4m3fn"}.get(scheme.numbers, scheme.numbers)
        return cls(codes, arranged, block, table, kind, frozenset(parts), inputs)

    def numbers(self, to: str) -> LazyTensor:
        """Code times scale in float32, times the input's factor, rounded to ``to``."""
        if self.inputs is None:
            return scaled(self.codes, self.table, self.scales, self.block, dtype(to))
        shape = self.codes.shape
        over = tuple(n if m == 1 else 1 for n, m in zip(shape, self.inputs.shape, strict=True))
        scales = Repeated(numbers_of(self.scales), self.block, shape)
        inputs = Repeated(numbers_of(self.inputs), over, shape)
        return Mapped((self.codes, scales, inputs), dtype(to), MultiplyTwice(self.table, dtype(to)))


@dataclass(frozen=True, eq=False)  # arrays cannot be compared as a whole
class MultiplyTwice(ElementWiseInto):
    """The number of each code in ``table`` (float32) times a scale, times an input's factor, rounded to ``to``."""

    table: Array
    to: DType

    def into(self, out: Array, codes: Array, scales: Array, inputs: Array) -> None:
        for number, some, several, factors in in_cache(out, codes.view("u1"), scales, inputs):
            with scratch(4 * some.size) as buffer, np.errstate(over="ignore", invalid="ignore"):
                numbers = buffer.view(np.float32).reshape(some.shape)
                look_up(self.table, some, numbers)
                np.multiply(numbers, several, out=numbers)
                np.multiply(numbers, factors, out=numbers)
                np.copyto(number, numbers, casting="unsafe")


def _fits(stored: LazyTensor, stem: str, scheme: Scheme, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether codes have a scheme's type and the scales that it has."""
    types = {
        "float8": ("float8_e4m3fn", "int8"),
        "int8": ("int8",),
        "packed int4": ("int8", "uint8"),
        "float4_e2m1": ("uint8",),
    }[scheme.numbers]
    there = all(stem + suffix in tensors for suffix in (scheme.scales, scheme.common) if suffix)
    return stored.dtype.name in types and stored.ndim > 1 and there


def _separate(stored: LazyTensor, scheme: Scheme) -> LazyTensor:
    if scheme.numbers == "packed int4":
        return Halved(stored, stored.ndim - 2)
    if scheme.numbers == "float4_e2m1":
        return Halved(stored, stored.ndim - 1)
    return stored


def _table(scheme: Scheme, kind: DType) -> Array:
    if scheme.numbers == "packed int4":  # two's complement
        return np.array([*range(8), *range(-8, 0)], dtype=np.float32)
    return table_of(scheme.numbers, dtype("float8_e4m3fn") if scheme.numbers == "float8" else kind)


def _arranged(shape: Shape, scales: LazyTensor) -> tuple[LazyTensor | None, Shape]:
    """Scales with as many axes as the codes, and the codes along each axis that one is of; None if they do not fit."""
    ones = tuple(1 for _ in shape)
    if scales.size == 1:
        return scales.reshape(ones), tuple(max(1, n) for n in shape)
    if len(shape) == 3 and scales.shape in ((shape[0],), (shape[0], 1)):  # one for each expert
        return scales.reshape((shape[0], 1, 1)), (1, *shape[1:])
    if scales.shape == shape[:-1]:
        return scales.reshape((*shape[:-1], 1)), (*ones[:-1], shape[-1])
    if len(shape) == 2 and scales.shape == (1, shape[0]):
        return scales.reshape((shape[0], 1)), (1, shape[1])
    if scales.ndim == len(shape) and scales.shape[:-1] == shape[:-1] and scales.shape[-1]:
        width, rest = divmod(shape[-1], scales.shape[-1])
        if width and not rest:
            return scales, (*ones[:-1], width)
    return None, ()


def _expected(shape: Shape, scheme: Scheme, stated: Any) -> str:
    if scheme.block is None:
        return f"one, or one for each of {shape[-2]} rows"
    if type(stated) is int and stated > 0:
        return f"{(*shape[:-1], -(-shape[-1] // stated))}, one for each {stated} of {shape[-1]} columns"
    return f"one for each block of a row of {shape[-1]} columns"


def _common(name: str, tensors: Mapping[str, LazyTensor], shape: Shape, path: str) -> LazyTensor:
    """The scale of the whole weight, or of each of stacked experts."""
    common, each = tensors[name], shape[:-2] if len(shape) > 2 else ()
    if (common.size != 1 and common.shape != each) or not common.dtype.is_floating:
        raise MappingError(
            "is not one number" + (" for each expert" if each else ""),
            path=path,
            tensor=name,
            expected=f"{math.prod(each)} floats" if each else "one float",
            found=f"{common.dtype.name} {common.shape}",
        )
    return common


def _of_inputs(name: str, factors: LazyTensor, shape: Shape, path: str) -> LazyTensor:
    """Factors of the inputs with as many axes as the weight, one for each column."""
    possible = {(shape[-1],), (1, shape[-1]), (*shape[:-2], shape[-1])}
    if factors.shape not in possible or factors.dtype.name not in _PREQUANT_TYPES:
        raise MappingError(
            "does not fit the weight's columns",
            path=path,
            tensor=name,
            expected=f"{shape[-1]} floats",
            found=f"{factors.dtype.name} {factors.shape}",
            remedy=_REMEDY,
        )
    leading = shape[:-2] if factors.shape == (*shape[:-2], shape[-1]) else tuple(1 for _ in shape[:-2])
    return factors.reshape((*leading, 1, shape[-1]))


def _beside(stem: str, tensors: Mapping[str, LazyTensor]) -> str:
    there = [suffix for suffix in (*_PARTS, PREQUANT) if stem + suffix in tensors]
    return ", ".join(there) or "no scales"
