"""Numbers of tensors that a model cannot have, and those that only look so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import LastingError, few
from anyckpt.operations.steps.compare_objects import leaves_within
from anyckpt.operations.steps.statistics import Statistics, counts, scan
from anyckpt.operations.steps.threads import Advance, Meter, Progress, each_of_tensors
from anyckpt.tensor import LazyTensor

_MASK = re.compile(r"(^|[._])(masks?|\w*_masks?|masked_bias|alibi\w*)\Z")
_EXTREMES = re.compile(r"(^|[._])((min|max)_vals?|best(_\w+)?(_score|_value|_loss|_metric))\Z")
"""What is infinite until something smaller or larger was seen, as observers of quantization and callbacks are."""

_STEERING = re.compile(
    r"(^|[._])(lrs?|learning_rate|weight_decay|wd|momentum|dampening|betas?|alpha|eps|epsilon|rho|trust_coefficient"
    r"|loss_scale|grad_scale|cur_scale|init_scale|_?scale|growth_factor|backoff_factor|scale_factor)(\.\d+)*\Z"
)
"""Numbers that the next step of training is computed with, so that none of it is finite if they are not."""

_MOST_TINY = 0.5
_SHOWN = 3


@dataclass
class Values:
    """What reading every element showed.

    Attributes:
        read: tensors whose elements were looked at.
        problems: tensor and what is wrong with it.
        warnings: what is odd and may be right.
        unread: tensors whose type no arithmetic is known for.
    """

    read: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def tensors_of_numbers(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """What ``check_values`` reads: every tensor of floating-point numbers, those among the objects included."""
    return _tensors(checkpoint, list(leaves_within(checkpoint.objects)))


def _tensors(checkpoint: Checkpoint, leaves: Iterable[tuple[str, Any]]) -> dict[str, LazyTensor]:
    listed = {id(tensor) for tensor in checkpoint.tensors.values()}
    inside = {name: t for name, t in leaves if isinstance(t, LazyTensor) and id(t) not in listed}
    every = {**inside, **checkpoint.tensors}
    return {name: t for name, t in every.items() if t.dtype.is_floating or t.dtype.kind == "complex"}


def look_at_numbers(tensor: LazyTensor, advance: Advance) -> Statistics | str | None:
    """What the elements of a tensor are like; why they cannot be read, or None if no arithmetic is known for the type.

    Raises:
        UnreachableError: they cannot be had at this moment.
    """
    try:
        found = counts(tensor, advance)
        if found is not None and not found.inf:
            return found
        again = None if found is not None else advance
        return scan(tensor, statistics=True, digest=False, advance=again).statistics
    except LastingError as error:
        return str(error)


def check_values(
    checkpoint: Checkpoint, progress: Progress | None, known: Mapping[str, Statistics | str | None] | None = None
) -> Values:
    """Read every floating-point tensor of a checkpoint, training state included, wherever it keeps it.

    NaN is a problem wherever it is, and so is infinity, but for masks of attention and what starts as infinity.  Single
    numbers of training state, whether tensors or not, are problems if the next step is computed with them, such as
    learning rates and loss scales; of others NaN is told, which the best loss of a run may be that has none yet.
    Denormal numbers are told where no training leaves them: in types of float32's range a few of them are what a stray
    write makes of integers; float16 has them all the time, so there only a tensor of nearly nothing else is told.
    """
    prefix = checkpoint.model_prefix
    own = {prefix + name for name in checkpoint.weights()}
    leaves = [
        leaf for leaf in leaves_within(checkpoint.objects) if isinstance(leaf[1], (LazyTensor, float, np.floating))
    ]
    tensors = _tensors(checkpoint, leaves)

    values = Values()
    _judge_numbers(leaves, values)
    meter = Meter(sum(tensor.nbytes for tensor in tensors.values()), progress)
    found_of = (
        [known[name] for name in tensors]
        if known is not None
        else each_of_tensors(look_at_numbers, tensors.values(), lambda tensor: [tensor], meter)
    )
    strays: list[str] = []
    tiny: list[str] = []
    for stored, found in zip(tensors, found_of, strict=True):
        tensor = tensors[stored]
        name = stored.removeprefix(prefix) if stored in own else stored
        if isinstance(found, str):
            values.problems.append((name, found))
        elif found is None:
            values.unread.append(name)
        else:
            values.read += 1
            _judge(name, tensor, found, "" if stored in own else "training state: ", values)
            if found.denormals and tensor.dtype.name != "float16":
                strays.append(f"{name} ({found.denormals:,} of {tensor.size:,})")
            elif found.denormals > _MOST_TINY * (tensor.size - found.zeros):
                tiny.append(f"{name} ({found.denormals:,} of {tensor.size:,})")
    if strays:
        values.warnings.append(f"denormal numbers, as a stray write leaves them, in {few(strays, _SHOWN)}")
    if tiny:
        values.warnings.append(f"numbers too small for float16 to hold more than a few bits of in {few(tiny, _SHOWN)}")
    return values


def _judge(name: str, tensor: LazyTensor, found: Statistics, where: str, values: Values) -> None:
    infinite = found.inf
    steering = bool(where) and _STEERING.search(name) is not None
    single = bool(where) and not tensor.ndim and not steering
    if infinite and (_is_mask(name, tensor, found) or _EXTREMES.search(name) or single):
        infinite = 0
    if not found.nan and not infinite:
        return
    counts = [f"{n:,} {what}" for n, what in ((found.nan, "NaN"), (infinite, "infinite")) if n]
    text = f"{where}{' and '.join(counts)} of {tensor.size:,} elements"
    if single:  # the best loss of a run that has none yet
        values.warnings.append(f"{name}: {text}")
    else:
        values.problems.append((name, text))


def _judge_numbers(leaves: Sequence[tuple[str, Any]], values: Values) -> None:
    for name, number in leaves:
        if isinstance(number, LazyTensor) or math.isfinite(number):
            continue
        text = f"training state: {'NaN' if math.isnan(number) else 'infinite'}"
        if _STEERING.search(name):
            values.problems.append((name, text))
        elif math.isnan(number):
            values.warnings.append(f"{name}: {text}")


def _is_mask(name: str, tensor: LazyTensor, found: Statistics) -> bool:
    """Whether infinities are those of a mask: all negative, beside one other number or under a mask's name."""
    if found.inf != found.negative_inf or tensor.ndim < 2:
        return False
    return bool(_MASK.search(name)) or (found.min is not None and found.min == found.max)
