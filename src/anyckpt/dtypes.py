"""One table of element types: our name and the spellings of every container.

Our name is torch's (``bfloat16``, ``float8_e4m3fn``).  Bytes are moved as unsigned integers of the same
width (``raw``), because numpy copies those fastest and knows no bfloat16; ``numpy`` is the type to compute
with, from numpy or ml_dtypes, and is None where neither has one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError

_RAW = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}


@dataclass(frozen=True, eq=False)
class DType:
    """An element type.

    It equals itself and every way to say it that ``dtype`` knows: ``tensor.dtype == "bfloat16"``, ``torch.bfloat16``,
    ``np.float32``.  Its hash is that of its name.

    Attributes:
        name: torch's name without ``torch.``.
        itemsize: bytes per stored element (``float4_e2m1fn_x2`` packs two numbers in its one byte).
        kind: ``float``, ``integer``, ``boolean``, ``complex`` or ``quantized``.
        numpy_name: name of the numpy or ml_dtypes type, or None.
        safetensors: spelling in a safetensors header, or None where the format has none.
        zarr: spelling in ``.zarray`` as Megatron-Core 0.12 writes it, or None.
        storage: name of torch's typed storage class in a pickle, or None (then UntypedStorage is used).
        in_torch: torch has this type; the others are bytes of packed numbers, which only safetensors can name.
    """

    name: str
    itemsize: int
    kind: str
    numpy_name: str | None = None
    safetensors: str | None = None
    zarr: str | None = None
    storage: str | None = None
    in_torch: bool = True

    def __eq__(self, other: object) -> bool:
        return self is other or self is _known(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dtype, (self.name,)

    @cached_property
    def raw(self) -> np.dtype[Any]:
        """Little-endian numpy type of the same width, for moving bytes."""
        return np.dtype(_RAW[self.itemsize])

    @cached_property
    def numpy(self) -> np.dtype[Any] | None:
        """The numpy type to compute with, or None."""
        if self.numpy_name is None:
            return None
        if hasattr(np, self.numpy_name) or self.numpy_name == "bool":
            little: np.dtype[Any] = np.dtype(self.numpy_name).newbyteorder("<")
            return little
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.numpy_name))
        return narrow

    @property
    def is_floating(self) -> bool:
        return self.kind == "float"

    @property
    def component_size(self) -> int:
        """Bytes of one number for byte swapping: a complex element is two numbers."""
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize

    def __repr__(self) -> str:
        return self.name


_TABLE = (
    DType("float64", 8, "float", "float64", "F64", "<f8", "DoubleStorage"),
    DType("float32", 4, "float", "float32", "F32", "<f4", "FloatStorage"),
    DType("float16", 2, "float", "float16", "F16", "<f2", "HalfStorage"),
    DType("bfloat16", 2, "float", "bfloat16", "BF16", "bfloat16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "float", "float8_e4m3fn", "F8_E4M3"),
    DType("float8_e5m2", 1, "float", "float8_e5m2", "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "float", "float8_e4m3fnuz", "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "float", "float8_e5m2fnuz", "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "float", "float8_e8m0fnu", "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1, "quantized", None, None),
    DType("float6_e2m3fn", 1, "quantized", in_torch=False),
    DType("float6_e3m2fn", 1, "quantized", in_torch=False),
    DType("int64", 8, "integer", "int64", "I64", "<i8", "LongStorage"),
    DType("int32", 4, "integer", "int32", "I32", "<i4", "IntStorage"),
    DType("int16", 2, "integer", "int16", "I16", "<i2", "ShortStorage"),
    DType("int8", 1, "integer", "int8", "I8", "|i1", "CharStorage"),
    DType("uint8", 1, "integer", "uint8", "U8", "|u1", "ByteStorage"),
    DType("uint16", 2, "integer", "uint16", "U16", "<u2"),
    DType("uint32", 4, "integer", "uint32", "U32", "<u4"),
    DType("uint64", 8, "integer", "uint64", "U64", "<u8"),
    DType("bool", 1, "boolean", "bool", "BOOL", "|b1", "BoolStorage"),
    DType("complex32", 4, "complex"),
    DType("complex64", 8, "complex", "complex64", "C64", "<c8", "ComplexFloatStorage"),
    DType("complex128", 16, "complex", "complex128", None, "<c16", "ComplexDoubleStorage"),
    DType("quint8", 1, "quantized", "uint8", storage="QUInt8Storage"),
    DType("qint8", 1, "quantized", "int8", storage="QInt8Storage"),
    DType("qint32", 4, "quantized", "int32", storage="QInt32Storage"),
    DType("quint4x2", 1, "quantized", storage="QUInt4x2Storage"),
    DType("quint2x4", 1, "quantized", storage="QUInt2x4Storage"),
    *(DType(f"{sign}int{bits}", 1, "quantized") for sign in ("u", "") for bits in range(1, 8)),
    *(DType(name, size, "quantized") for name, size in (("bits8", 1), ("bits16", 2))),
)

BY_NAME: dict[str, DType] = {entry.name: entry for entry in _TABLE}
BY_SAFETENSORS: dict[str, DType] = {e.safetensors: e for e in _TABLE if e.safetensors}
BY_STORAGE: dict[str, DType] = {e.storage: e for e in _TABLE if e.storage}
BY_ZARR: dict[str, DType] = {e.zarr: e for e in _TABLE if e.zarr}

_SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "fp64": "float64",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    "32-true": "float32",
}


def dtype(name: Any) -> DType:
    """The entry called ``name``.

    Args:
        name: torch's name, with or without ``torch.``, a short form such as ``bf16``, a type of torch, numpy or
            ml_dtypes, or an entry.

    Raises:
        FormatError: no such element type.
    """
    found = _known(name)
    if found is None:
        raise FormatError(f"unknown element type {name!r}", expected=f"one of {', '.join(BY_NAME)}")
    return found


def from_numpy(kind: np.dtype[Any]) -> DType:
    """The entry for a numpy or ml_dtypes type, byte order ignored.

    Raises:
        FormatError: the type has no entry (object, string and structured types).
    """
    found = BY_NAME.get(kind.name)
    if found is None:
        raise FormatError(f"numpy type {kind} has no counterpart in a checkpoint")
    return found


def _known(name: object) -> DType | None:
    """The entry that a name, an entry or another library's type stands for; None if it is none of these."""
    if isinstance(name, DType):
        return name
    if type(name).__name__ == "dtype" and type(name).__module__ == "torch":  # without importing torch
        name = str(name)
    if isinstance(name, str):
        plain = name.removeprefix("torch.")
        return BY_NAME.get(_SHORT.get(plain, plain))
    if isinstance(name, np.dtype):
        return BY_NAME.get(name.name)
    if isinstance(name, type) and issubclass(name, np.generic):
        return BY_NAME.get(np.dtype(name).name)
    return None
