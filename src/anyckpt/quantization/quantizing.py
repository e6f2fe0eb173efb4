"""Quantizing a weight to the nearest codes, with nothing but the weight: codes and scales as lazy tensors.

``quantized`` gives what a weight becomes, by role.  N is its rows (outputs), K its columns (inputs); axes before these,
as of stacked experts, stay in front of every shape.

=================== ================================== ========================= ====================
algorithm           ``weight``                         ``scale``                 ``scale_2``
=================== ================================== ========================= ====================
``fp8``             float8_e4m3fn [N, K]               float32 [1], of the whole
``fp8_per_channel`` float8_e4m3fn [N, K]               float32 [N]
``fp8_blocks``      float8_e4m3fn [N, K]               float32 [⌈N/128⌉, ⌈K/128⌉]
``int8_wo``         int8 [N, K]                        float32 [N]
``int4``            int8 [N/2, K]                      float32 [N, K/g]
``mxfp4``           uint8 [N, K/2]                     uint8 exponents [N, K/32]
``nvfp4``           uint8 [N, K/2]                     float8_e4m3fn [N, K/16]   float32 []
=================== ================================== ========================= ====================

A weight is its codes times its scale (times ``scale_2``).  These are NVIDIA ModelOpt 0.40's numbers, byte for byte,
except that MXFP4 rounds ties to even and chooses its powers of two as compressed-tensors 0.20 does.  ``int4`` puts two
rows in a byte, the even one in the low half; the 4-bit floats two columns, the even one in the low half.  With
``Options.packed_words`` integers lie as compressed-tensors' ``pack-quantized`` has them: int32 [N, K/8] or [N, K/4],
codes plus 8 or 128, from the least bits on, and scales [N, K/g] or [N, 1] of the type ``Options.scale_type``.
"""

from __future__ import annotations

from anyckpt.blockwise import blockwise
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import UsageError
from anyckpt.quantization.coding import BlockCodes, NvFp4, Packing, PowersOfTwo, Scaled, TensorCodes
from anyckpt.quantization.largest import ScaleOfTensor, TensorScale, largest_in
from anyckpt.quantization.rounding import E4M3, FLOAT4, INT4, INT8
from anyckpt.tensor import LazyTensor, Mapped

ALGORITHMS = {
    "fp8": "8-bit floats, a scale for each weight",
    "fp8_per_channel": "8-bit floats, a scale for each row",
    "fp8_blocks": "8-bit floats, a scale for each block of 128 by 128",
    "int8_wo": "8-bit integers, a scale for each row",
    "int4": "4-bit integers, a scale for each group of a row",
    "mxfp4": "4-bit floats, a power of two for each 32",
    "nvfp4": "4-bit floats, an 8-bit float for each 16 and a scale for each weight",
}
"""What can be made without activations, and what it is."""

_FLOAT32 = dtype("float32")
_BLOCK = 128


@dataclass(frozen=True)
class Options:
    """How to quantize.

    Attributes:
        group_size: ``int4``: columns with one scale.
        together: ``fp8``, ``nvfp4``: weights, this one among them, that get one scale of the whole; itself alone if
            there are none.
        first: ``int8_wo``, ``int4``: a type to which a weight is rounded before it is coded; scales are made of it as
            it is.  ModelOpt's export to Hugging Face does so where it smoothed a weight.
        unsigned: ``int4``: bytes are uint8, as ModelOpt has them for Hugging Face.
        rounded: ``fp8``: a type to which the weight over its scale is rounded before it is coded.  ModelOpt's export
            to Hugging Face divides in the weight's own type; its export to TensorRT-LLM does not (None).
        packed_words: ``int8_wo``, ``int4``: lay codes as compressed-tensors' ``pack-quantized`` does.
        wider: integers: divide the largest magnitude by half a step more (127.5, 7.5), as compressed-tensors does.
        inverted: ``nvfp4``: state ``scale_2`` as what codes are divided by, as compressed-tensors does.
        scale_type: of the scales of rows, blocks and groups of ``fp8_per_channel``, ``fp8_blocks``, ``int8_wo`` and
            ``int4``; codes are made with the scale as it is stored.
        name: the weight's, for messages.
        names_together: those of ``together``.
    """

    group_size: int = 128
    together: tuple[LazyTensor, ...] = ()
    first: DType | None = None
    unsigned: bool = False
    rounded: DType | None = None
    packed_words: bool = False
    wider: bool = False
    inverted: bool = False
    scale_type: DType = _FLOAT32
    name: str | None = None
    names_together: tuple[str, ...] = ()


def check_algorithm(name: str) -> None:
    """Raise UsageError, with those there are, unless ``name`` is an algorithm."""
    if name not in ALGORITHMS:
        raise UsageError("unknown algorithm of quantization", expected=", ".join(ALGORITHMS), found=name)


def quantized(weight: LazyTensor, algorithm: str, options: Options | None = None) -> dict[str, LazyTensor]:
    """What a weight becomes: its codes (``weight``) and ``scale``, for NVFP4 ``scale_2`` as well.

    Nothing is read.  Reading the outputs together, as a plan's writer does, computes every block once; a scale of the
    whole weight takes a pass of its own over it before.

    Args:
        weight: floating point, ``[..., N, K]``.
        algorithm: one of ``ALGORITHMS``.
        options: how.

    Raises:
        UsageError: no such algorithm, the weight is no matrix of floating-point numbers, or groups do not divide it.
            A weight with infinite values or not-a-numbers raises FormatError when it is read.
    """
    chosen = Options() if options is None else options
    check_algorithm(algorithm)
    if weight.ndim < 2 or weight.dtype.kind != "float" or weight.dtype.itemsize < 2:
        raise UsageError(
            "cannot be quantized",
            expected="a matrix of floating-point numbers",
            found=f"{weight.dtype.name} {weight.shape}",
        )
    if algorithm in ("fp8", "nvfp4"):
        names = chosen.names_together if chosen.together else (() if chosen.name is None else (chosen.name,))
        largest = largest_in(chosen.together or (weight,), names)
    if algorithm == "fp8":
        scale = TensorScale(largest, E4M3.largest)
        codes = Mapped((weight,), E4M3.dtype, TensorCodes(scale, E4M3, chosen.rounded))
        return {"weight": codes, "scale": ScaleOfTensor(scale, (1,))}
    if algorithm == "nvfp4":
        over = FLOAT4.largest * E4M3.largest
        common = TensorScale(largest, over, chosen.inverted)
        function: BlockCodes = NvFp4(1, 16, FLOAT4, "columns", E4M3.dtype, chosen.name, common)
        return {**_blocks(weight, function), "scale_2": ScaleOfTensor(common, (1,) if chosen.inverted else ())}
    function = _function(algorithm, chosen)
    made = _blocks(weight, function)
    if function.columns is None and not chosen.packed_words:
        made["scale"] = made["scale"].reshape(weight.shape[:-1])
    return made


def _function(algorithm: str, options: Options) -> BlockCodes:
    kind = options.scale_type
    if algorithm == "mxfp4":
        return PowersOfTwo(1, 32, FLOAT4, "columns", dtype("uint8"), options.name)
    if algorithm == "fp8_per_channel":
        return Scaled(1, None, E4M3, "none", kind, options.name, E4M3.largest)
    if algorithm == "fp8_blocks":
        return Scaled(_BLOCK, _BLOCK, E4M3, "none", kind, options.name, E4M3.largest)
    wider = 0.5 if options.wider else 0.0
    if algorithm == "int8_wo":
        return Scaled(
            1,
            None,
            INT8,
            "words" if options.packed_words else "none",
            kind,
            options.name,
            INT8.largest + wider,
            options.first,
        )
    packing: Packing = "words" if options.packed_words else "unsigned rows" if options.unsigned else "rows"
    if options.group_size < 1:
        raise UsageError("a group must have columns", expected="at least 1", found=options.group_size)
    return Scaled(1, options.group_size, INT4, packing, kind, options.name, INT4.largest + wider, options.first)


def _blocks(weight: LazyTensor, function: BlockCodes) -> dict[str, LazyTensor]:
    rows, columns = weight.shape[-2:]
    if function.columns is not None and function.rows == 1 and columns % function.columns:
        raise UsageError(
            "groups do not divide the rows of a weight",
            expected=f"a multiple of {function.columns} columns",
            found=f"{columns} columns",
            remedy=("choose another --group-size, or " if function.numbers == INT4 else "")
            + "leave the module as it is with --quantize-exclude",
        )
    if function.packing in ("rows", "unsigned rows") and rows % 2:
        raise UsageError(
            "two rows of 4-bit integers share a byte, and the last row is alone",
            expected="an even number of rows",
            found=rows,
            remedy="leave the module as it is with --quantize-exclude",
        )
    each = function.codes_in_a_word
    unit = columns if function.columns is None else function.columns
    if unit % each:
        raise UsageError(
            f"{each} codes share a word, and a {'row' if function.columns is None else 'group'} ends within one",
            expected=f"a multiple of {each} columns",
            found=f"{unit} columns",
            remedy=("" if function.columns is None else "choose another --group-size, or ")
            + "leave the module as it is with --quantize-exclude",
        )
    codes, scales = blockwise(weight, function)
    return {"weight": codes, "scale": scales}
