"""Dequantizing a checkpoint that a format found to be quantized, where the user asks for a floating-point type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from anyckpt import quantization
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.operations.steps.casts import TARGETS
from anyckpt.operations.steps.pipeline import Stepped

_KEY = "quantization_config"
_KEYS = (_KEY, "quantization")
"""Where a configuration says how weights are quantized; MLX says it under both."""
_OVERFLOW = "float16 ends at 65,504: larger values become infinite, which anyckpt verify --deep finds"


def in_full_precision(checkpoint: Checkpoint, to: str | None, config: Mapping[str, Any] | None = None) -> Stepped:
    """The checkpoint with quantized weights as numbers of type ``to``, and its configuration saying so.

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
        return Stepped(checkpoint)
    prefix, weights = checkpoint.model_prefix, checkpoint.weights()
    done = quantization.dequantize(weights, facts, to, checkpoint.path)
    others = {name: t for name, t in checkpoint.tensors.items() if name.removeprefix(prefix) not in weights}
    plain = replace(
        checkpoint,
        tensors={**{prefix + name: tensor for name, tensor in done.tensors.items()}, **others},
        config={key: value for key, value in checkpoint.config.items() if key not in _KEYS},
        quantization=None,
    )
    count = sum(done.casts.values())
    notes = [f"{count} weights were quantized ({quantization.method_of(facts)}) and are written as {to}"]
    if to == "float16":
        notes.append(_OVERFLOW)
    return Stepped(plain, done.ignored, tuple(notes), done.casts)


@contextmanager
def codes_side_by_side(checkpoints: Collection[Checkpoint]) -> Iterator[None]:
    """While tensors of several checkpoints are brought together: where codes do not fit, numbers may.

    Args:
        checkpoints: as they are when something does not fit.

    Raises:
        MappingError: as it came; of quantized checkpoints, it says how their weights become numbers.
    """
    try:
        yield
    except MappingError as error:
        quantized = any(checkpoint.quantization is not None for checkpoint in checkpoints)
        if not quantized or (error.tensor is None and error.remedy is None):  # the models are of several families
            raise
        raise error.told_as(MappingError, remedy=_NUMBERS) from None


_NUMBERS = "quantized weights are codes, whose numbers may fit: ask for those with --dtype bf16"


def config_in_full_precision(config: dict[str, Any] | None, to: str | None) -> dict[str, Any] | None:
    """A configuration that the user gave, without what it says of quantization where weights become numbers."""
    if config is None or to is None or not isinstance(config.get(_KEY), Mapping):
        return config
    return {key: value for key, value in config.items() if key not in _KEYS}


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
