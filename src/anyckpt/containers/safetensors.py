"""The safetensors container: eight bytes of header length, a JSON header, then the elements without gaps.

The rules are those of the safetensors library 0.8 (its Rust core): a header of at most 100 MB, ranges that follow
one another without a gap or an overlap up to the last byte of the file, each exactly as long as its shape asks
for.  Files that this module writes are byte for byte those that the library writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from anyckpt.containers.safetensors_header import parse_header
from anyckpt.dtypes import BY_SAFETENSORS, DType, dtype
from anyckpt.engine.plan import Literal, Part, TensorData
from anyckpt.errors import FormatError, UsageError
from anyckpt.escaping import is_text
from anyckpt.storage.heads import EDGE, read_each
from anyckpt.storage.source import ByteSource, check_not_pointer
from anyckpt.tensor import LazyTensor, Stored

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted

HEADER_LIMIT = 100_000_000
"""Bytes of header that the safetensors library accepts."""

_PACKED = {
    "F4": (dtype("float4_e2m1fn_x2"), 2, 1),
    "F6_E2M3": (dtype("float6_e2m3fn"), 4, 3),
    "F6_E3M2": (dtype("float6_e3m2fn"), 4, 3),
}
"""Types smaller than a byte: ours, and how many numbers are how many bytes.  Their shapes count numbers in the header
and bytes here, as torch's do."""

_AXES_OF_ANY = 32  # which all releases of numpy take, by which elements are moved
_CODE_OF = {kind: code for code, (kind, _, _) in _PACKED.items()}

_WRITING_ORDER = tuple(
    """
    U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 F6_E3M2
    F6_E2M3 F4 BOOL
    """.split()
)
"""Element types in the order in which the library 0.8 lays tensors out; by name within a type."""


def safetensors_steps(source: ByteSource) -> Iterator[Sequence[Wanted]]:
    """What ``read_safetensors`` reads, in rounds: the first bytes, then the rest of a longer header."""
    yield [(source, 0, EDGE)]
    yield [(source, 8, min(HEADER_LIMIT, int.from_bytes(source.read(0, 8), "little")))]


def read_safetensors(source: ByteSource) -> tuple[dict[str, LazyTensor], dict[str, str] | None]:
    """The tensors of a file, in the order of its header, and its ``__metadata__``, None if it has none.

    Reads the header only.

    Raises:
        FormatError: the file is truncated, its header is not valid, or ranges do not fit shapes, one another or
            the file.
    """
    return read_each(_read, [source], safetensors_steps)[0]


def read_safetensors_files(
    sources: Iterable[ByteSource],
) -> list[tuple[dict[str, LazyTensor], dict[str, str] | None]]:
    """What ``read_safetensors`` gives of each file; headers of those that are far are asked for at once.

    Raises:
        FormatError: see ``read_safetensors``.
    """
    return read_each(_read, sources, safetensors_steps)


def _read(source: ByteSource) -> tuple[dict[str, LazyTensor], dict[str, str] | None]:
    check_not_pointer(source.read(0, min(64, source.size)), source.name)
    if source.size < 8:
        raise _damaged(source, "is too short for a safetensors file", "at least 8 bytes", f"{source.size} bytes")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > HEADER_LIMIT:
        raise _damaged(source, "its header is too large", f"at most {HEADER_LIMIT} bytes", f"{length} bytes")
    if 8 + length > source.size:
        raise _damaged(source, "is truncated inside its header", f"at least {8 + length} bytes", f"{source.size} bytes")
    entries, metadata = _parsed(source, source.read(8, length))
    tensors: dict[str, LazyTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        begin, end, tensor = _tensor(source, name, entry, 8 + length)
        ranges.append((begin, end, name))
        tensors[name] = tensor
    _check_ranges(source, ranges, source.size - 8 - length)
    return tensors, metadata


def safetensors_parts(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> tuple[Part, ...]:
    """A safetensors file of these tensors, laid out as the library does.

    Args:
        tensors: whole tensors; two names of one tensor are written twice, for the format has no sharing.
        metadata: becomes ``__metadata__``; left out if None.

    Raises:
        UsageError: an element type that the format has no spelling for, or a reserved name.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    parts: list[Part] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_rank(*item), item[0])):
        if name == "__metadata__":
            raise UsageError("safetensors reserves this name for metadata", tensor=name, remedy="exclude the tensor")
        shape = [*tensor.shape]
        code = _code(name, tensor.dtype)
        if code in _PACKED:
            _, numbers, held = _PACKED[code]
            if not shape or shape[-1] % held:
                raise UsageError(
                    f"safetensors cannot hold rows of {tensor.dtype.name} that end inside a group",
                    tensor=name,
                    expected=f"a last length divisible by {held}",
                    found=list(shape),
                    remedy="exclude the tensor",
                )
            shape[-1] = shape[-1] // held * numbers
        end = offset + tensor.nbytes
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        parts.append(TensorData(name, tensor))
        offset = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _no_text(tensors, metadata or {}) from None
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise UsageError(
            "too many tensors for one safetensors file",
            expected=f"a header of at most {HEADER_LIMIT} bytes",
            found=f"{len(text)} bytes",
            remedy="convert to hf, which shards",
        )
    return (Literal(len(text).to_bytes(8, "little") + text), *parts)


def _parsed(source: ByteSource, text: bytes) -> tuple[dict[str, Any], dict[str, str] | None]:
    if text.lstrip(b" \t\r\n")[:1] != b"{":
        raise _damaged(source, "is not a safetensors file", "a header that begins with '{'", repr(text[:8]))
    try:
        return parse_header(text)
    except UnicodeEncodeError:
        raise _damaged(source, "its header has half of a surrogate pair", "Unicode text", None) from None
    except ValueError as error:
        raise _damaged(source, f"its header is not valid JSON: {_brief(error)}", None, None) from None


def _tensor(source: ByteSource, name: str, entry: Any, base: int) -> tuple[int, int, LazyTensor]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(source, "its header entry is incomplete", "dtype, shape and data_offsets", entry, name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    packing = _PACKED.get(code) if isinstance(code, str) else None
    kind = packing[0] if packing is not None else BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if kind is None:
        raise _damaged(source, "has an unknown element type", f"one of {', '.join(_WRITING_ORDER)}", code, name)
    if not isinstance(shape, list) or _too_many(len(shape)) or not all(map(_is_count, shape)):
        raise _damaged(source, "has an invalid shape", f"at most {_axes_limit()} lengths, none negative", shape, name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _damaged(source, "has invalid data_offsets", "begin and end", offsets, name)
    if math.prod(filter(None, shape)) * kind.itemsize >= 1 << 63:
        raise _damaged(source, "has an impossible shape", "fewer than 2**63 bytes", shape, name)
    if packing is not None:
        _, numbers, held = packing
        if not shape or shape[-1] % numbers:
            raise _damaged(
                source,
                f"has rows of {code} that do not end with a byte",
                f"a last length divisible by {numbers}",
                shape,
                name,
            )
        shape[-1] = shape[-1] // numbers * held
    begin, end = offsets
    needed = math.prod(shape) * kind.itemsize
    if end - begin != needed:
        raise _damaged(
            source,
            "its range is not as long as its shape asks for",
            f"{needed} bytes for {kind.name} {shape}",
            f"[{begin}, {end})",
            name,
        )
    return begin, end, Stored(source, base + begin, kind, tuple(shape))


def _check_ranges(source: ByteSource, ranges: list[tuple[int, int, str]], available: int) -> None:
    at = 0
    for begin, end, name in sorted(ranges):
        if end > available:
            raise _damaged(
                source,
                "its range lies outside the file; the file is truncated or its header is damaged",
                f"within {available} bytes of data",
                f"[{begin}, {end})",
                name,
            )
        if begin != at:
            problem = "its range overlaps another tensor's" if begin < at else "there is a gap before its range"
            raise _damaged(source, problem, f"to begin at {at}", f"[{begin}, {end})", name)
        at = end
    if at != available:
        raise _damaged(source, "has bytes after its last tensor", f"{at} bytes of data", f"{available} bytes")


def _too_many(axes: int) -> bool:
    return axes > _AXES_OF_ANY and axes > _axes_limit()


def _axes_limit() -> int:
    return _AXES_OF_ANY if np.__version__.startswith("1.") else 64


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _code(name: str, kind: DType) -> str:
    code = _CODE_OF.get(kind, kind.safetensors)
    if code is None:
        raise UsageError(
            f"safetensors cannot hold {kind.name}",
            tensor=name,
            remedy="exclude the tensor, cast with --dtype, or convert to torch",
        )
    return code


def _rank(name: str, tensor: LazyTensor) -> int:
    return _WRITING_ORDER.index(_code(name, tensor.dtype))


def _brief(error: Exception) -> str:
    return str(error)[:120]


def _no_text(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> UsageError:
    """The error for a name or metadata with half of a surrogate pair, which UTF-8 cannot spell."""
    name = next((name for name in tensors if not is_text(name)), None)
    return UsageError(
        "safetensors cannot hold a name with half of a surrogate pair"
        if name is not None
        else "safetensors cannot hold metadata with half of a surrogate pair",
        tensor=name,
        expected="Unicode text",
        found=None if name is not None else ascii(metadata)[:120],
        remedy="exclude the tensor, or convert to torch or dcp" if name is not None else None,
    )


def _damaged(
    source: ByteSource, problem: str, expected: object, found: object, tensor: str | None = None
) -> FormatError:
    text = None if found is None else str(found)[:120]
    return FormatError(
        problem,
        path=source.name,
        tensor=tensor,
        expected=expected,
        found=text,
        remedy="copy the file again from its origin",
    )
