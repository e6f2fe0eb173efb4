"""Methods of quantization: by which names a weight's codes and scales are stored, and which codes a scale is of.

From transformers 5.23 (``FineGrainedFP8Config``, ``Mxfp4Config``, ``FbgemmFp8Config``), NVIDIA ModelOpt 0.40's export
to Hugging Face and compressed-tensors 0.20.  In most of them a weight is a code times a scale (``Scheme``); of the
others ``assembled`` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.quantization import mlx
from anyckpt.quantization.assembled import Assembled, awq, gptq, int8_rows, modelopt_int4, modelopt_int8, nf4, packed

Facts = Mapping[str, Any]
"""A configuration's ``quantization_config``."""

Size = tuple[int, int] | None

Numbers = Literal["float8", "float4_e2m1", "int8", "packed int4", "packed int8"]
"""What codes are: 8-bit floats; e2m1, two in a byte; integers, as they are or from their least one on in int32."""


@dataclass(frozen=True)
class Scheme:
    """How a quantized weight is stored.

    Attributes:
        codes: what follows the weight's name in that of its codes.
        scales: the same of its scales, of which there is one for all codes, one for each row of them, or one for each
            block.
        block: rows and columns of a block; None if there are no blocks.
        numbers: what the codes are.
        common: the same of a number by which all scales are multiplied; "" if there is none.
        grouped: the bytes of a block are an axis of their own, the last.
        transposed: the weight's last two axes are those of the codes the other way round.
        divided: the common number is one by which all scales are divided.
        exponents: scales are exponents of 2.
    """

    codes: str
    scales: str
    block: Size
    numbers: Numbers = "float8"
    common: str = ""
    grouped: bool = False
    transposed: bool = False
    divided: bool = False
    exponents: bool = False

    @property
    def of_scales(self) -> tuple[str, ...]:
        """How names of scales end."""
        return tuple(filter(None, (self.scales, self.common)))


Stored = Scheme | Assembled
"""Ways in which a weight may be stored."""


def _fp8(facts: Facts) -> tuple[Stored, ...]:
    size = facts.get("weight_block_size", (128, 128))  # null if there is one scale in all
    return (Scheme("", "_scale_inv", None if size is None else _size(size, "weight_block_size")),)


def _mxfp4(facts: Facts) -> tuple[Stored, ...]:
    return (Scheme("_blocks", "_scales", (1, 32), "float4_e2m1", grouped=True, transposed=True, exponents=True),)


def _fbgemm(facts: Facts) -> tuple[Stored, ...]:
    return (Scheme("", "_scale", None),)


def _modelopt(facts: Facts) -> tuple[Stored, ...]:
    algorithm = str(facts.get("quant_algo")).upper()
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        stated = facts.get("group_size")
        return (modelopt_int4(None if stated is None else _number(stated, "group_size")),)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return (modelopt_int8(),)
    if algorithm == "W8A16":
        return (Scheme("", "_scale", None, "int8"),)
    if algorithm not in ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"):
        return ()
    return (
        Scheme("", "_scale", (1, 16), "float4_e2m1", common="_scale_2"),
        Scheme("", "_scale", (128, 128)),
    )


def _gptq(facts: Facts) -> tuple[Stored, ...]:
    """Of its second version zero points are stored as they are; the first one stores one less."""
    form = facts.get("checkpoint_format", "gptq")
    bits = facts.get("bits")
    if type(bits) is not int or bits not in (2, 4, 8) or form not in ("gptq", "gptq_v2"):
        return ()
    return (gptq(bits, lowered=form == "gptq"),)


def _awq(facts: Facts) -> tuple[Stored, ...]:
    """AutoAWQ's own file has other words than transformers' configuration."""
    version = str(facts.get("version", "gemm")).lower()
    if facts.get("bits", facts.get("w_bit")) != 4 or version != "gemm":
        return ()
    return (awq(zeros=facts.get("zero_point", True) is not False),)


def _bitsandbytes(facts: Facts) -> tuple[Stored, ...]:
    return nf4(), int8_rows()


_TRTLLM: Mapping[str, tuple[Scheme, ...]] = {
    "FP8": (Scheme(".weight", ".weights_scaling_factor", None),),
    "FP8_PER_CHANNEL_PER_TOKEN": (Scheme(".weight", ".per_channel_scale", None),),
    "W8A8_SQ_PER_CHANNEL": (Scheme(".weight", ".weights_scaling_factor", None, "int8"),),
    "W8A16": (Scheme(".weight", ".weights_scaling_factor", None, "int8"),),
    "W4A16": (Scheme(".weight", ".weights_scaling_factor", (1, 128), "packed int4"),),
    "W4A16_AWQ": (Scheme(".weight", ".weights_scaling_factor", (1, 128), "packed int4"),),
    "W4A8_AWQ": (Scheme(".weight", ".weights_scaling_factor", (1, 128), "packed int4"),),
    "NVFP4": (
        Scheme(".weight", ".weights_scaling_factor", (1, 16), "float4_e2m1", common=".weights_scaling_factor_2"),
    ),
}
"""By TensorRT-LLM's name of the algorithm; the width of a block is what ``group_size`` and the scales say."""


def _trtllm(facts: Facts) -> tuple[Stored, ...]:
    algorithm = facts.get("quant_algo")
    if algorithm is None:  # only the cache of keys and values is quantized
        return _TRTLLM["FP8"]
    if algorithm == "MIXED_PRECISION" and isinstance(facts.get("quantized_layers"), Mapping):
        layers = facts["quantized_layers"].values()
        named = [layer.get("quant_algo") for layer in layers if isinstance(layer, Mapping)]
        known = [_TRTLLM[name] for name in dict.fromkeys(map(str, named)) if name in _TRTLLM]
        return tuple(scheme for schemes in known for scheme in schemes) if len(known) == len(set(named)) else ()
    return _TRTLLM.get(str(algorithm), ())


def _compressed_tensors(facts: Facts) -> tuple[Stored, ...]:
    """Its first group of layers tells; further groups must be like it."""
    stated = facts.get("config_groups")
    groups = (
        [group.get("weights") for group in stated.values() if isinstance(group, Mapping)]
        if (isinstance(stated, Mapping))
        else []
    )
    weights: list[Mapping[str, Any]] = [group for group in groups if isinstance(group, Mapping)] or [{}]
    keys = ("num_bits", "type", "symmetric", "group_size", "block_structure")
    first = weights[0]
    alike = all(group.get(key) == first.get(key) for group in weights for key in keys)
    if not alike:
        return ()
    block = None
    if first.get("block_structure") is not None:
        block = _size(first["block_structure"], "block_structure")
    elif isinstance(first.get("group_size"), int) and first["group_size"] > 0:
        block = _size((1, first["group_size"]), "group_size")
    bits, kind = first.get("num_bits", 8), first.get("type", "float")
    name = facts.get("format")
    symmetric = first.get("symmetric", True) is True
    if name == "pack-quantized" and kind == "int" and type(bits) is int and bits in (2, 4, 8):
        in_words: Numbers = "packed int4" if bits == 4 else "packed int8"
        plain = (Scheme("_packed", "_scale", block, in_words),) if symmetric and bits != 2 else ()
        return (packed(bits, zeros=not symmetric), *plain) if first.get("actorder") or not plain else plain
    if name == "nvfp4-pack-quantized" and (bits, kind) == (4, "float") and block == (1, 16):
        return (Scheme("_packed", "_scale", block, "float4_e2m1", common="_global_scale", divided=True),)
    if name == "mxfp4-pack-quantized" and (bits, kind) == (4, "float") and block == (1, 32):
        return (Scheme("_packed", "_scale", block, "float4_e2m1", exponents=True),)
    if not symmetric:
        return ()
    if name in ("float-quantized", "naive-quantized") and (bits, kind) == (8, "float"):
        return (Scheme("", "_scale", block),)
    if name in ("int-quantized", "naive-quantized") and (bits, kind) == (8, "int"):
        return (Scheme("", "_scale", block, "int8"),)
    return ()


def _mlx(facts: Facts) -> tuple[Stored, ...]:
    """The whole model's way, and those of single modules by name."""
    own = {name: said for name, said in facts.items() if isinstance(said, Mapping)}
    ways: dict[mlx.Way, set[str]] = {}
    for module, said in own.items():
        ways.setdefault(_way_of_mlx(said), set()).add(module)
    apart = tuple(mlx.stored(way, frozenset(modules).__contains__) for way, modules in ways.items())
    return (*apart, mlx.stored(_way_of_mlx(facts), lambda module: module not in own))


def _way_of_mlx(facts: Facts) -> mlx.Way:
    """What is not said is what is usual for the mode."""
    mode = str(facts.get("mode", mlx.AFFINE))
    usual = next((way for way in mlx.FLOATS if way.mode == mode), mlx.USUAL)
    way = mlx.Way(
        mode,
        _number(facts.get("bits", usual.bits), "bits"),
        _number(facts.get("group_size", usual.group), "group_size"),
    )
    if way not in mlx.FLOATS and (mode != mlx.AFFINE or way.bits not in mlx.BITS):
        found = f"mode {mode} of {way.bits} bits in {way.group}"
        raise MappingError("MLX does not quantize so", expected=mlx.KNOWN, found=found[:80])
    return way


def _number(value: Any, key: str) -> int:
    if type(value) is int and 0 < value < 1 << 31:
        return value
    raise MappingError(
        f"the quantization_config's {key} is not possible", expected="a positive number", found=repr(value)[:80]
    )


def _size(value: Any, key: str) -> Size:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in value):
        return value[0], value[1]
    raise MappingError(
        f"the quantization_config's {key} is not possible",
        expected="rows and columns of a block",
        found=repr(value)[:80],
    )


@dataclass(frozen=True)
class Method:
    """A ``quant_method``.

    Attributes:
        schemes: how weights may be stored, of a configuration; nothing if it is of another variant.
        title: what of it is understood, for messages.
        variant: key of the configuration that names the variant, or "".
    """

    schemes: Callable[[Facts], tuple[Stored, ...]]
    title: str
    variant: str = ""


METHODS: Mapping[str, Method] = {
    "fp8": Method(_fp8, "fp8"),
    "mxfp4": Method(_mxfp4, "mxfp4"),
    "modelopt": Method(
        _modelopt, "modelopt FP8, NVFP4, W8A16, W8A8_SQ_PER_CHANNEL, W4A16_AWQ and W4A8_AWQ", "quant_algo"
    ),
    "compressed-tensors": Method(
        _compressed_tensors, "compressed-tensors of 4- and 8-bit floats and of integers", "format"
    ),
    "fbgemm_fp8": Method(_fbgemm, "fbgemm_fp8"),
    "gptq": Method(_gptq, "gptq of 2, 4 and 8 bits", "checkpoint_format"),
    "awq": Method(_awq, "awq gemm", "version"),
    "bitsandbytes": Method(_bitsandbytes, "bitsandbytes"),
    mlx.METHOD: Method(_mlx, f"MLX's {mlx.KNOWN}", "mode"),
    "trtllm": Method(_trtllm, f"TensorRT-LLM's {', '.join(_TRTLLM)}", "quant_algo"),
}
"""Those that are understood, by ``quant_method``."""


def method_of(facts: Facts) -> str:
    """What a configuration calls its method, for messages: ``quant_method`` and the variant, where it says them."""
    name = facts.get("quant_method")
    variant = METHODS[name].variant if isinstance(name, str) and name in METHODS else ""
    said = (name, facts.get(variant))
    return " ".join(part[:40] for part in said if isinstance(part, str)) or "one without quant_method"


def is_understood(facts: Facts) -> bool:
    """Whether ``schemes_of`` knows the method."""
    try:
        return bool(schemes_of(facts))
    except MappingError:
        return False


def schemes_of(facts: Facts) -> tuple[Stored, ...]:
    """How the weights may be stored.

    Raises:
        MappingError: the method, or this variant of it, is not understood.
    """
    name = facts.get("quant_method")
    method = METHODS.get(name) if isinstance(name, str) else None
    schemes = () if method is None else method.schemes(facts)
    if not schemes:
        raise MappingError(
            "the model is quantized by a method that is not understood",
            expected=", ".join(known.title for known in METHODS.values()),
            found=method_of(facts),
            remedy="dequantize it with its own tools, or copy the files as they are with --to safetensors",
        )
    return schemes
