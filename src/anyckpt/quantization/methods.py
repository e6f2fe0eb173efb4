"""Methods of quantization: by which names a weight's codes and scales are stored, and which codes a scale is of.

From transformers 5.23 (``FineGrainedFP8Config``, ``Mxfp4Config``, ``FbgemmFp8Config``), NVIDIA ModelOpt 0.40's export
to Hugging Face and compressed-tensors' ``float-quantized``.  In all of them a weight is a code times a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anyckpt.errors import MappingError

Facts = Mapping[str, Any]
"""A configuration's ``quantization_config``."""

Size = tuple[int, int] | None


@dataclass(frozen=True)
class Scheme:
    """How a quantized weight is stored.

    Attributes:
        codes: what follows the weight's name in that of its codes.
        scales: the same of its scales, of which there is one for all codes, one for each row of them, or one for each
            block.
        block: rows and columns of a block; None if there are no blocks.
        halved: codes are e2m1, two in a byte; else they are 8-bit floats.
        common: the same of a number by which all scales are multiplied; "" if there is none.
        grouped: the bytes of a block are an axis of their own, the last.
        transposed: the weight's last two axes are those of the codes the other way round.
    """

    codes: str
    scales: str
    block: Callable[[Facts], Size]
    halved: bool = False
    common: str = ""
    grouped: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Method:
    """A ``quant_method``.

    Attributes:
        schemes: how weights may be stored.
        variants: key of the configuration that tells variants apart, and those of these schemes; None if there are
            no variants.
    """

    schemes: tuple[Scheme, ...]
    variants: tuple[str, frozenset[str]] | None = None


def _no_blocks(facts: Facts) -> Size:
    return None


def _declared(facts: Facts) -> Size:
    """``weight_block_size`` of transformers; null if there is one scale in all."""
    return _size(facts.get("weight_block_size", (128, 128)), "weight_block_size")


def _structured(facts: Facts) -> Size:
    """``block_structure`` of compressed-tensors, of its first group of layers that has one."""
    groups = facts.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure") is not None:
            return _size(weights["block_structure"], "block_structure")
    return None


def _size(value: Any, key: str) -> Size:
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in value):
        return value[0], value[1]
    raise MappingError(
        f"the quantization_config's {key} is not possible", expected="rows and columns of a block",
        found=repr(value)[:80],
    )  # fmt: skip


METHODS: Mapping[str, Method] = {
    "fp8": Method((Scheme("", "_scale_inv", _declared),)),
    "mxfp4": Method((Scheme("_blocks", "_scales", lambda facts: (1, 32), halved=True, grouped=True, transposed=True),)),
    "modelopt": Method(
        (
            Scheme("", "_scale", lambda facts: (1, 16), halved=True, common="_scale_2"),
            Scheme("", "_scale", lambda facts: (128, 128)),
        ),
        ("quant_algo", frozenset({"FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"})),
    ),
    "compressed-tensors": Method(
        (Scheme("", "_scale", _structured),), ("format", frozenset({"FLOAT-QUANTIZED", "NAIVE-QUANTIZED"}))
    ),
    "fbgemm_fp8": Method((Scheme("", "_scale", _no_blocks),)),
}
"""Those that are understood, by ``quant_method``."""


def method_of(facts: Facts) -> str:
    """What a configuration calls its method, for messages: ``quant_method`` and the variant, where it says them."""
    name = facts.get("quant_method")
    variants = METHODS[name].variants if isinstance(name, str) and name in METHODS else None
    said = [name, facts.get(variants[0])] if variants is not None else [name]
    return " ".join(part[:40] for part in said if isinstance(part, str)) or "one without quant_method"


def is_understood(facts: Facts) -> bool:
    """Whether ``schemes_of`` knows the method."""
    try:
        return bool(schemes_of(facts))
    except MappingError:
        return False


def schemes_of(facts: Facts) -> tuple[Scheme, ...]:
    """How the weights may be stored.

    Raises:
        MappingError: the method, or this variant of it, is not understood.
    """
    name = facts.get("quant_method")
    method = METHODS.get(name) if isinstance(name, str) else None
    variant = facts.get(method.variants[0]) if method is not None and method.variants is not None else None
    known = method is not None and (method.variants is None or str(variant).upper() in method.variants[1])
    if method is None or not known:
        raise MappingError(
            "the model is quantized by a method that is not understood",
            expected=", ".join(_titles()), found=method_of(facts),
            remedy="dequantize it with its own tools, or copy the files as they are with --to safetensors",
        )  # fmt: skip
    return method.schemes


def _titles() -> list[str]:
    return [
        f"{name} ({', '.join(sorted(method.variants[1]))})" if method.variants is not None else name
        for name, method in METHODS.items()
    ]
