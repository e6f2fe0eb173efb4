"""Dequantizing: weights that are codes and scales become numbers, when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError
from anyckpt.indexing import Array, Shape
from anyckpt.quantization import trtllm
from anyckpt.quantization.affine import Unpacked
from anyckpt.quantization.assembled import Assembled
from anyckpt.quantization.methods import Facts, Scheme, method_of, schemes_of
from anyckpt.quantization.nodes import Halved, as_bytes, product, quotient, scaled
from anyckpt.quantization.numbers import table_of
from anyckpt.tensor import LazyTensor

OF_ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".q_scale",
    ".prob_output_scale",
)
_UNNEEDED = "the scale of a quantized activation, which a model in full precision does not have"
_TAKEN_INTO_NUMBERS = "says how a weight was quantized, which its numbers have"
_ENDS = ("weight", "_proj")
"""How names of weights end that are quantized, so that a model's own ``logit_scale`` is not taken for a part of one."""

_SHAPE = "_shape"
"""What follows a weight's name in that of a tensor with its shape, where codes are packed."""

_BESIDE = ("_zero_point", "_g_idx")
"""The same of what makes a weight more than codes times scales."""

_CODES = {
    "float8": "float8_e4m3fn",
    "float4_e2m1": "uint8",
    "int8": "int8",
    "packed int4": "int32",
    "packed int8": "int32",
}
"""Element types of codes."""

_SCALE_TYPES = {"float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu", "uint8"}
_EXPONENTS = {"float8_e8m0fnu", "uint8"}
"""Types of scales that are exponents of 2, as those of MXFP4 are: transformers takes any other for exponents too."""


@dataclass(frozen=True)
class Dequantized:
    """The outcome.

    Attributes:
        tensors: weights under the names that the model has them unquantized.
        casts: "float8_e4m3fn -> bfloat16" -> number of weights.
        ignored: names that are left out -> reason.
    """

    tensors: dict[str, LazyTensor]
    casts: dict[str, int]
    ignored: dict[str, str]


def refusal(facts: Facts, path: str) -> MappingError:
    """The error for a quantized model that was not asked to be dequantized."""
    try:
        schemes_of(facts)
    except MappingError as error:
        error.path = path
        return error
    return MappingError(
        "the model is quantized, and its weights are not those of its family",
        path=path,
        expected="weights in full precision",
        found=method_of(facts),
        remedy="dequantize it with --dtype bf16, or copy the files as they are with --to safetensors",
    )


def dequantize(tensors: Mapping[str, LazyTensor], facts: Facts, to: str, path: str) -> Dequantized:
    """Weights as numbers; nothing is read but shapes that are stored as tensors.

    Code times scale is computed in float32 and rounded once more to ``to``, as transformers does.

    Args:
        tensors: weights, codes and scales by name.
        facts: the configuration's ``quantization_config``.
        to: ``bfloat16``, ``float16`` or ``float32``.
        path: of the checkpoint, for messages.

    Raises:
        MappingError: the method is not understood, scales or codes are missing, or scales do not fit their codes.
    """
    try:
        schemes = schemes_of(facts)
    except MappingError as error:
        error.path = path
        raise
    products = tuple(scheme for scheme in schemes if isinstance(scheme, Scheme))
    assembled = tuple(scheme for scheme in schemes if isinstance(scheme, Assembled))
    if facts.get("quant_method") == trtllm.METHOD:
        return Dequantized(*trtllm.numbers(tensors, facts, products, to, path))
    spared = _spared(facts)
    used: set[str] = set()
    ignored: dict[str, str] = {}
    made: dict[str, LazyTensor] = {}
    casts: Counter[str] = Counter()
    for name, codes in tensors.items():
        more = next((pair for one in assembled if (pair := (one, one.parts(name, tensors)))[1] is not None), None)
        scheme = next((scheme for scheme in products if _fits(name, codes, scheme, tensors)), None)
        if more is not None:
            stem = name.removesuffix(more[0].codes)
            used |= {stem + part for part in more[1] or {}} - {stem + more[0].weight}
            weight = _assembled(name, more[0], more[1] or {}, to, path)
            made[stem + more[0].weight] = weight
            ignored |= dict.fromkeys((stem + part for part in _not_in(weight, more[1] or {})), _TAKEN_INTO_NUMBERS)
            casts[f"{more[0].numbers} -> {to}"] += 1
        elif scheme is not None:
            stem = name.removesuffix(scheme.codes)
            used |= {stem + suffix for suffix in (scheme.scales, scheme.common, _SHAPE) if suffix}
            made[stem] = _weight(name, codes, stem, scheme, tensors, to, path)
            kind = codes.dtype.name if scheme.numbers == "float8" else scheme.numbers.removeprefix("packed ")
            casts[f"{kind} -> {to}"] += 1
        elif name.endswith(OF_ACTIVATIONS):
            ignored[name] = _UNNEEDED
        else:
            made.setdefault(name, codes)
    result: dict[str, LazyTensor] = {}
    ends = tuple(
        end + suffix for one in products for suffix in (one.scales, one.common, one.codes) if suffix for end in _ENDS
    )
    for name, tensor in made.items():
        if name in used:
            continue
        result[name] = _checked(name, tensor, ends, assembled, spared, to, path)
    return Dequantized(result, dict(casts), ignored)


def _not_in(weight: LazyTensor, parts: Mapping[str, LazyTensor]) -> list[str]:
    """Parts of which no byte is in a weight, though its numbers depend on them: tables, shapes, orders of columns."""
    held = {(id(piece.source), piece.offset) for piece in weight.pieces()}
    return [
        part for part, tensor in parts.items() if all((id(p.source), p.offset) not in held for p in tensor.pieces())
    ]


def _assembled(name: str, scheme: Assembled, parts: Mapping[str, LazyTensor], to: str, path: str) -> LazyTensor:
    try:
        return scheme.make(parts, dtype(to))
    except MappingError as error:
        error.tensor, error.path = name, path
        raise


def _fits(name: str, codes: LazyTensor, scheme: Scheme, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a tensor is the codes of a weight that is stored so."""
    stem = name.removesuffix(scheme.codes)
    if not name.endswith(scheme.codes) or stem + scheme.scales not in tensors or not codes.ndim:
        return False
    if scheme.common and stem + scheme.common not in tensors:
        return False
    kind = codes.dtype.name
    return kind == _CODES[scheme.numbers] or (scheme.numbers == "float8" and kind.startswith("float8_e"))


@dataclass(frozen=True)
class Separated:
    """A weight as codes and scales, before anything is computed.

    Attributes:
        codes: one in a byte, ``[..., rows, columns]``.
        scales: as many axes, one for each block, or one in all.
        block: codes along each axis that one scale is of.
        table: the number of each code, float32.
        numbers: what the codes are.
    """

    codes: LazyTensor
    scales: LazyTensor
    block: tuple[int, ...]
    table: Array
    numbers: str


def separated(tensors: Mapping[str, LazyTensor], facts: Facts, path: str) -> dict[str, Separated]:
    """The quantized weights that are codes times scales, by the names that the model has them by.

    Args:
        tensors: weights, codes and scales by name.
        facts: the configuration's ``quantization_config``.
        path: of the checkpoint, for messages.

    Raises:
        MappingError: the method is not understood, or scales do not fit their codes.
    """
    schemes = [scheme for scheme in schemes_of(facts) if isinstance(scheme, Scheme) and not scheme.transposed]
    found: dict[str, Separated] = {}
    for name, codes in tensors.items():
        scheme = next((scheme for scheme in schemes if _fits(name, codes, scheme, tensors)), None)
        if scheme is not None:
            stem = name.removesuffix(scheme.codes)
            found[stem] = _separated(name, codes, stem, scheme, tensors, path)
    return found


def _weight(
    name: str, codes: LazyTensor, stem: str, scheme: Scheme, tensors: Mapping[str, LazyTensor], to: str, path: str
) -> LazyTensor:
    found = _separated(name, codes, stem, scheme, tensors, path)
    whole = scaled(found.codes, found.table, found.scales, found.block, dtype(to))
    if not scheme.transposed:
        return whole
    order = (*range(whole.ndim - 2), whole.ndim - 1, whole.ndim - 2)
    return whole.permute(order)


def _separated(
    name: str, codes: LazyTensor, stem: str, scheme: Scheme, tensors: Mapping[str, LazyTensor], path: str
) -> Separated:
    surplus = next((stem + suffix for suffix in _BESIDE if stem + suffix in tensors), None)
    if surplus is not None:
        raise MappingError(
            "is of a quantized weight that is more than codes times scales",
            path=path,
            tensor=surplus,
            remedy="dequantize the model with its own tools",
        )
    scales = tensors[stem + scheme.scales]
    types = _EXPONENTS if scheme.exponents else _SCALE_TYPES
    if scales.dtype.name not in types:
        raise MappingError(
            "scales have no such type",
            path=path,
            tensor=stem + scheme.scales,
            expected=", ".join(sorted(types)),
            found=scales.dtype.name,
        )
    if scheme.grouped and scheme.block is not None:
        codes = _merged(name, codes, scheme.block[1], path)
    elements = _elements(name, codes, stem, scheme, tensors, path)
    arranged, sizes = _arranged(elements.shape, scales, scheme.block)
    if arranged is None:
        raise MappingError(
            "scales do not fit the weight's codes",
            path=path,
            tensor=stem + scheme.scales,
            expected=f"one for each block of {scheme.block}, row, or all of {elements.shape}",
            found=scales.shape,
            remedy="copy config.json and weight files again, from one revision of the model",
        )
    if scheme.common:
        common = tensors[stem + scheme.common]
        if common.size != 1 or not common.dtype.is_floating:
            raise MappingError(
                "is not one number",
                path=path,
                tensor=stem + scheme.common,
                expected="one float",
                found=f"{common.dtype.name} {common.shape}",
            )
        arranged = (quotient if scheme.divided else product)(arranged, common)
    return Separated(elements, arranged, sizes, table_of(scheme.numbers, codes.dtype), scheme.numbers)


def _elements(
    name: str, codes: LazyTensor, stem: str, scheme: Scheme, tensors: Mapping[str, LazyTensor], path: str
) -> LazyTensor:
    """Codes, one in a byte, ``[..., rows, columns]``."""
    if scheme.numbers in ("float8", "int8"):
        return codes
    if scheme.numbers == "float4_e2m1":
        return Halved(codes, codes.ndim - 1)
    separate = as_bytes(codes)
    shape = _stored_shape(tensors.get(stem + _SHAPE), codes.ndim)
    each = 2 if scheme.numbers == "packed int4" else 1
    if shape is None or -(-shape[-1] // (4 * each)) != codes.shape[-1] or (shape[:-1] != codes.shape[:-1]):
        raise MappingError(
            "packed codes are not those of a weight",
            path=path,
            tensor=name,
            expected=f"{stem}{_SHAPE} with its shape, and so many codes in int32",
            found=f"{codes.shape} codes of {shape}",
        )
    elements: LazyTensor = Unpacked(codes, codes.ndim - 1, 8 // each)
    if separate is not None:
        elements = Halved(separate, separate.ndim - 1) if each == 2 else separate
    return elements.narrow(elements.ndim - 1, 0, shape[-1])


def _stored_shape(stored: LazyTensor | None, ndim: int) -> Shape | None:
    """The shape that a small tensor says."""
    if stored is None or stored.dtype.kind != "integer" or stored.shape != (ndim,):
        return None
    return tuple(int(n) for n in stored.numpy())


def _merged(name: str, codes: LazyTensor, width: int, path: str) -> LazyTensor:
    """Codes ``[..., columns]`` of ``[..., blocks, bytes of a block]``, two of ``width`` codes in a byte."""
    if codes.ndim < 3 or not codes.size or 2 * codes.shape[-1] != width:
        raise MappingError(
            "is not blocks of a quantized weight",
            path=path,
            tensor=name,
            expected=f"rows, blocks of a row, and {width // 2} bytes of a block",
            found=codes.shape,
        )
    return codes.reshape((*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))


def _arranged(
    shape: Shape, scales: LazyTensor, block: tuple[int, int] | None
) -> tuple[LazyTensor | None, tuple[int, ...]]:
    """Scales with as many axes as the codes, and how many codes along each axis one is of; None if they do not fit."""
    ones = tuple(1 for _ in shape)
    if scales.size == 1:
        return scales.reshape(ones), tuple(max(1, n) for n in shape)
    if scales.ndim == 4 and len(shape) == 2 and scales.shape[1] == scales.shape[3] == 1:  # as ModelOpt writes blocks
        scales = scales.reshape((scales.shape[0], scales.shape[2]))
    if block is not None and len(shape) > 1:
        sizes = (*ones[:-2], *block)
        if scales.shape == tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True)):
            return scales, sizes
    if scales.shape in (shape[:-1], (*shape[:-1], 1)):
        return scales.reshape((*shape[:-1], 1)), (*ones[:-1], max(1, shape[-1]))
    return None, ()


def _checked(
    name: str,
    tensor: LazyTensor,
    ends: tuple[str, ...],
    assembled: Iterable[Assembled],
    spared: tuple[str, ...],
    to: str,
    path: str,
) -> LazyTensor:
    """A tensor of the result, if it is none of the parts of a quantized weight; unquantized 8-bit floats are cast.

    Args:
        ends: of the names of the parts of products.
    """
    if name.endswith(ends) or any(name.endswith(_ends_of(scheme, tensor)) for scheme in assembled):
        raise MappingError(
            "is part of a quantized weight whose other parts are missing or of other types",
            path=path,
            tensor=name,
            remedy="copy the weight files again from the model's origin",
        )
    if tensor.dtype.itemsize > 1:
        return tensor
    if not any(_names(pattern, name) for pattern in spared):
        raise MappingError(
            "is a quantized weight without scales",
            path=path,
            tensor=name,
            expected="scales beside it, or its module among those that are not quantized",
            found=tensor.dtype.name,
            remedy="copy the file with its scales from the model's origin; if there never were any, name its module "
            "under modules_to_not_convert of the quantization_config, and its numbers are taken as they are",
        )
    return tensor.cast(to) if tensor.dtype.is_floating else tensor


def _ends_of(scheme: Assembled, tensor: LazyTensor) -> tuple[str, ...]:
    """Of the names of a weight's parts, if a tensor can be one of them."""
    codes = scheme.codes if tensor.dtype.name == scheme.kind and tensor.dtype.itemsize > 1 else ""
    return tuple(f".{part}" for part in (codes, *scheme.needed) if part and (part != scheme.weight or codes))


def _spared(facts: Facts) -> tuple[str, ...]:
    """Patterns of the modules that are not quantized, under each of the methods' keys for them."""
    patterns: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        value = facts.get(key)
        patterns += [pattern for pattern in value if isinstance(pattern, str)] if isinstance(value, list) else []
    return tuple(patterns)


def _names(pattern: str, name: str) -> bool:
    """Whether a module's pattern is of a tensor: its beginning, or the end of its module, up to a dot.

    Patterns are names, globs, or (with ``re:``) regular expressions, of which only ``.*`` and escaped dots are
    understood: an expression from a file may take any time.
    """
    plain = pattern.removeprefix("re:").replace("\\.", ".").replace(".*", "*")
    begin, end = ("" if plain.startswith("*") else "."), ("" if plain.endswith("*") else ".")
    pieces = f"{begin}{plain}{end}".split("*")
    module = f".{name.rpartition('.')[0]}."
    at = 0
    for piece in pieces:
        at = module.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True
