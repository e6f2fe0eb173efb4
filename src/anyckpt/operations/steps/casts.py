"""Changing the element type of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType, dtype
from anyckpt.errors import FormatError, UsageError
from anyckpt.operations.steps.globs import matching
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.tensor import LazyTensor

TARGETS = ("bfloat16", "float16", "float32")

KEEP_IN_FP32 = ("*expert_bias", "*e_score_correction_bias", "*A_log", "*.D", "*dt_bias")
"""Names of weights that training code holds in float32 whatever the model's type, because rounding them changes
routing or decay: the router's bias (Megatron-Core ``expert_bias``, DeepSeek ``e_score_correction_bias``) and Mamba's
``A_log``, ``D`` and ``dt_bias``."""


@dataclass(frozen=True)
class Cast:
    """The outcome.

    Attributes:
        tensors: all tensors, cast or not.
        casts: "float32 -> bfloat16" -> number of tensors.
        notes: which tensors were kept as they are, and why.
    """

    tensors: dict[str, LazyTensor]
    casts: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ChangedType:
    """Which type a weight gets that is computed, so that it is rounded once.

    Attributes:
        target: torch's name of the type that the user asks for, None for the weight's own.
        keep: globs of weights that keep theirs.
    """

    target: str | None
    keep: Sequence[str]

    def __call__(self, name: str, weight: LazyTensor) -> DType:
        if self.target is None or (self.target != "float32" and matching([name], self.keep)):
            return weight.dtype
        return dtype(self.target)


def cast_target(name: str | None) -> str | None:
    """Torch's name of the type that the user asked for.

    Raises:
        UsageError: weights are not cast to this type.
    """
    if name is None:
        return None
    try:
        target = dtype(name).name
    except FormatError:
        target = name
    if target not in TARGETS:
        raise UsageError("weights cannot be cast to this type", expected=", ".join(TARGETS), found=name)
    return target


def cast_weights(tensors: dict[str, LazyTensor], to: str | None, keep: Sequence[str] = KEEP_IN_FP32) -> Cast:
    """Cast floating-point weights; integers, booleans, complex numbers and 8-bit floats stay as they are.

    Eight-bit floats are quantized values, meaningless without the scale beside them, so rounding them to another type
    would not be the same weight.

    Args:
        tensors: weights by name.
        to: as ``cast_target`` takes it; no cast at all if None.
        keep: globs of names that stay as they are unless ``to`` is float32.

    Raises:
        UsageError: weights are not cast to this type.
    """
    name = cast_target(to)
    if name is None:
        return Cast(tensors, {}, ())
    target = dtype(name)
    kept = set() if target.name == "float32" else set(matching(tensors, keep))
    casts: Counter[str] = Counter()
    listed: list[str] = []
    result: dict[str, LazyTensor] = {}
    eight_bit = 0
    for name, tensor in tensors.items():
        result[name] = tensor
        if not tensor.dtype.is_floating or tensor.dtype == target:
            continue
        if tensor.dtype.itemsize == 1:
            eight_bit += 1
        elif name in kept:
            listed.append(name)
        else:
            result[name] = tensor.cast(target)
            casts[f"{tensor.dtype.name} -> {target.name}"] += 1
    notes = []
    if listed:
        notes.append(f"kept in their stored type, because rounding them changes the model: {', '.join(listed)}")
    if target.name == "float16" and casts:
        notes.append("float16 ends at 65,504: larger values become infinite, which anyckpt verify --deep finds")
    if eight_bit:
        notes.append(
            f"{eight_bit} tensors of 8-bit floats are quantized values and are not cast; if no scales belong to them, "
            'give the model\'s config.json with --config, in it "quantization_config": {"quant_method": "fp8", '
            '"modules_to_not_convert": ["*"]}'
        )
    return Cast(result, dict(casts), tuple(notes))


def cast_checkpoint(checkpoint: Checkpoint, to: str | None, keep: Sequence[str] = KEEP_IN_FP32) -> Stepped:
    """The checkpoint with its weights cast as ``cast_weights`` does."""
    if to is None:
        return Stepped(checkpoint)
    cast = cast_weights(checkpoint.weights(), to, keep)
    weights = {checkpoint.model_prefix + name: tensor for name, tensor in cast.tensors.items()}
    changed = replace(checkpoint, tensors={**checkpoint.tensors, **weights})
    return Stepped(changed, notes=cast.notes, casts=cast.casts)
