"""Dequantizing a checkpoint that a format found to be quantized, where the user asks for a floating-point type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anyckpt import quantization
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.operations.steps.casts import TARGETS

_KEY = "quantization_config"
_OVERFLOW = "float16 ends at 65,504: larger values become infinite, which anyckpt verify --deep finds"


@dataclass(frozen=True)
class FullPrecision:
    """A checkpoint whose weights are numbers.

    Attributes:
        checkpoint: dequantized, or as it was.
        config: the configuration that the user gave, without what it says of quantization.
        casts: "float8_e4m3fn -> bfloat16" -> number of weights.
        ignored: stored names that are left out -> reason.
        notes: what a user should know.
    """

    checkpoint: Checkpoint
    config: dict[str, Any] | None = None
    casts: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def in_full_precision(checkpoint: Checkpoint, to: str | None, config: dict[str, Any] | None = None) -> FullPrecision:
    """The checkpoint with quantized weights as numbers of type ``to``, and a configuration that says so.

    Without a type nothing changes: quantized files are copied as they are where that is possible.

    Args:
        checkpoint: as read.
        to: torch's name of the type that the user asks for, or None.
        config: a configuration that replaces the checkpoint's, or None.

    Raises:
        MappingError: the method of quantization is not understood, or parts of weights are missing or do not fit.
    """
    stated = None if config is None else config.get(_KEY)
    facts = stated if isinstance(stated, Mapping) else checkpoint.quantization
    if to is None or facts is None:
        return FullPrecision(checkpoint, config)
    prefix, weights = checkpoint.model_prefix, checkpoint.weights()
    done = quantization.dequantize(weights, facts, to, checkpoint.path)
    others = {name: t for name, t in checkpoint.tensors.items() if name.removeprefix(prefix) not in weights}
    plain = replace(
        checkpoint,
        tensors={**{prefix + name: tensor for name, tensor in done.tensors.items()}, **others},
        config={key: value for key, value in checkpoint.config.items() if key != _KEY},
        quantization=None,
    )
    given = None if config is None else {key: value for key, value in config.items() if key != _KEY}
    count = sum(done.casts.values())
    notes = [f"{count} weights were quantized ({quantization.method_of(facts)}) and are written as {to}"]
    if to == "float16":
        notes.append(_OVERFLOW)
    return FullPrecision(plain, given, done.casts, done.ignored, tuple(notes))


def seen_in_full_precision(checkpoint: Checkpoint, like: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint with quantized weights as numbers, to tell what it is; as it is where that is impossible.

    Nothing is read.

    Args:
        checkpoint: quantized or not.
        like: a checkpoint whose most frequent type the numbers shall have; they are bfloat16 without one, and where
            that is quantized itself.
    """
    sizes = Counter(dict.fromkeys(TARGETS, 0))
    for tensor in like.weights().values() if like is not None and like.quantization is None else ():
        if tensor.dtype.name in sizes:
            sizes[tensor.dtype.name] += tensor.nbytes
    try:
        return in_full_precision(checkpoint, max(sizes, key=lambda name: sizes[name])).checkpoint
    except MappingError:
        return checkpoint


def obstacle(checkpoint: Checkpoint) -> MappingError | None:
    """Why a quantized checkpoint's weights cannot be seen as numbers; None if they can, or if it is not quantized."""
    try:
        in_full_precision(checkpoint, "bfloat16")
    except MappingError as error:
        return error
    return None
