"""The safetensors container: eight bytes of header length, a JSON header, then the elements without gaps.

The rules are those of the safetensors library 0.8 (its Rust core): a header of at most 100 MB, ranges that follow
one another without a gap or an overlap up to the last byte of the file, each exactly as long as its shape asks
for.  Files that this module writes are byte for byte those that the library writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import BY_SAFETENSORS, DType, dtype
from anyckpt.engine.plan import Literal, OutputFile, Part, Plan, TensorData
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.registry import Format, Location, WriteOptions, without_configuration
from anyckpt.storage.source import ByteSource, LocalFile, check_not_pointer
from anyckpt.tensor import LazyTensor, Stored

HEADER_LIMIT = 100_000_000
"""Bytes of header that the safetensors library accepts."""

_AXES_LIMIT = 32  # what numpy 1 can hold
_FLOAT4 = dtype("float4_e2m1fn_x2")
_FLOAT4_CODE = "F4"  # its shapes count numbers, torch's count bytes of two numbers

_WRITING_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", _FLOAT4_CODE, "BOOL",
)  # fmt: skip
"""Element types in the order in which the library 0.8 lays tensors out; by name within a type."""


def read_safetensors(source: ByteSource) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, in the order of its header, and its ``__metadata__``.

    Reads the header only.

    Raises:
        FormatError: the file is truncated, its header is not valid, or ranges do not fit shapes, one another or
            the file.
    """
    check_not_pointer(source.read(0, min(64, source.size)), source.name)
    if source.size < 8:
        raise _damaged(source, "is too short for a safetensors file", "at least 8 bytes", f"{source.size} bytes")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > HEADER_LIMIT:
        raise _damaged(source, "its header is too large", f"at most {HEADER_LIMIT} bytes", f"{length} bytes")
    if 8 + length > source.size:
        raise _damaged(source, "is truncated inside its header", f"at least {8 + length} bytes", f"{source.size} bytes")
    entries = _parse_header(source, source.read(8, length))
    metadata = _metadata(source, entries.pop("__metadata__", {}))
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
        if tensor.dtype == _FLOAT4:
            shape[-1] *= 2
        end = offset + tensor.nbytes
        header[name] = {"dtype": _code(name, tensor.dtype), "shape": shape, "data_offsets": [offset, end]}
        parts.append(TensorData(name, tensor))
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise UsageError(
            "too many tensors for one safetensors file",
            expected=f"a header of at most {HEADER_LIMIT} bytes", found=f"{len(text)} bytes",
            remedy="convert to hf, which shards",
        )  # fmt: skip
    return (Literal(len(text).to_bytes(8, "little") + text), *parts)


def _parse_header(source: ByteSource, text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise _damaged(source, "is not a safetensors file", "a header that begins with '{'", repr(text[:8]))
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        "".join(entries).encode("utf-8")  # a lone surrogate, which JSON can spell, is not text
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its header is not valid JSON: {_brief(error)}", None, None) from None
    found: dict[str, Any] = entries
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name!r} occurs twice")
        entries[name] = value
    return entries


def _metadata(source: ByteSource, entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise _damaged(source, "its __metadata__ is not a map from text to text", None, None)
    return entry


def _tensor(source: ByteSource, name: str, entry: Any, base: int) -> tuple[int, int, LazyTensor]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(source, "its header entry is incomplete", "dtype, shape and data_offsets", entry, name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    kind = _FLOAT4 if code == _FLOAT4_CODE else BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if kind is None:
        raise _damaged(source, "has an unknown element type", f"one of {', '.join(_WRITING_ORDER)}", code, name)
    if not isinstance(shape, list) or len(shape) > _AXES_LIMIT or not all(map(_is_count, shape)):
        raise _damaged(source, "has an invalid shape", f"at most {_AXES_LIMIT} lengths, none negative", shape, name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _damaged(source, "has invalid data_offsets", "begin and end", offsets, name)
    if math.prod(max(n, 1) for n in shape) * kind.itemsize >= 1 << 63:
        raise _damaged(source, "has an impossible shape", "fewer than 2**63 bytes", shape, name)
    if kind == _FLOAT4:
        if not shape or shape[-1] % 2:
            raise _damaged(source, "packs an odd count of 4-bit numbers", "an even last length", shape, name)
        shape[-1] //= 2
    begin, end = offsets
    needed = math.prod(shape) * kind.itemsize
    if end - begin != needed:
        raise _damaged(
            source, "its range is not as long as its shape asks for",
            f"{needed} bytes for {kind.name} {shape}", f"[{begin}, {end})", name,
        )  # fmt: skip
    return begin, end, Stored(source, base + begin, kind, tuple(shape))


def _check_ranges(source: ByteSource, ranges: list[tuple[int, int, str]], available: int) -> None:
    at = 0
    for begin, end, name in sorted(ranges):
        if end > available:
            raise _damaged(
                source, "its range lies outside the file; the file is truncated or its header is damaged",
                f"within {available} bytes of data", f"[{begin}, {end})", name,
            )  # fmt: skip
        if begin != at:
            problem = "its range overlaps another tensor's" if begin < at else "there is a gap before its range"
            raise _damaged(source, problem, f"to begin at {at}", f"[{begin}, {end})", name)
        at = end
    if at != available:
        raise _damaged(source, "has bytes after its last tensor", f"{at} bytes of data", f"{available} bytes")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _code(name: str, kind: DType) -> str:
    code = _FLOAT4_CODE if kind == _FLOAT4 else kind.safetensors
    if code is None:
        raise UsageError(
            f"safetensors cannot hold {kind.name}", tensor=name,
            remedy="exclude the tensor, cast with --dtype, or convert to torch",
        )  # fmt: skip
    return code


def _rank(name: str, tensor: LazyTensor) -> int:
    return _WRITING_ORDER.index(_code(name, tensor.dtype))


def _brief(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]


def _damaged(
    source: ByteSource, problem: str, expected: object, found: object, tensor: str | None = None
) -> FormatError:
    text = None if found is None else str(found)[:120]
    return FormatError(
        problem, path=source.name, tensor=tensor, expected=expected, found=text,
        remedy="copy the file again from its origin",
    )  # fmt: skip


# -- the format: one loose file ------------------------------------------------------------------------------


def _detect(location: Location) -> bool:
    if location.is_directory:
        return False
    if location.head.startswith(b"PK\x03\x04"):
        return False  # a file of torch.save under a wrong name
    return location.suffix == ".safetensors" or (
        location.head[8:10] in (b'{"', b"{}", b"{ ") and int.from_bytes(location.head[:8], "little") <= HEADER_LIMIT
    )


def _read(location: Location) -> Checkpoint:
    tensors, metadata = read_safetensors(LocalFile(location.path))
    return Checkpoint(location.path, "safetensors", tensors, details={"metadata": metadata} if metadata else {})


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    weights, ignored = weights_only(checkpoint)
    metadata = checkpoint.details.get("metadata") if checkpoint.format == "safetensors" else None
    parts = safetensors_parts(weights, metadata or {"format": "pt"})
    return Plan("safetensors", (OutputFile("", parts),), ignored=ignored, notes=without_configuration(checkpoint))


def weights_only(checkpoint: Checkpoint) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The weights under their own names, and why everything else is left out."""
    reason = "training state, which this format has no place for"
    prefixes = checkpoint.state_prefixes or ("\0",)
    ignored = {
        name: reason
        for name in checkpoint.tensors
        if name.startswith(prefixes) or not name.startswith(checkpoint.model_prefix)
    }
    ignored.update(dict.fromkeys(checkpoint.objects, "not a tensor, and this format keeps tensors only"))
    return checkpoint.weights(), ignored


FORMAT = Format(
    name="safetensors",
    title="safetensors file",
    detect=_detect,
    read=_read,
    plan=_plan,
    single_file=True,
)
