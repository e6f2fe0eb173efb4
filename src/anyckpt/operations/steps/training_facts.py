"""What people ask of training state: the learning rate, and the loss scale of fp16 training.

Sources of the spellings: ``torch.optim``'s ``param_groups``, torch's schedulers (``_last_lr``),
``torch.amp.GradScaler.state_dict`` (2.13), Megatron-Core's ``DynamicGradScaler`` (0.16), DeepSpeed's loss scalers
(``cur_scale``), Apex's ``amp.state_dict``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.errors import LastingError
from anyckpt.pickling.plain import view
from anyckpt.pickling.records import Record
from anyckpt.tensor import LazyTensor

_MOST = 200_000
_DEEPEST = 24
_RATE = re.compile(r"(?:^|\.)param_groups\.\d+\.lr$")
_SCALES = {
    "scale": ("growth_factor", "growth_tracker", "_growth_tracker", "growth_interval"),
    "loss_scale": ("unskipped",),
    "cur_scale": (),
}
"""Key of a loss scale -> what stands beside it, one of these at least, if there are any."""


def learning_rates(objects: Mapping[str, Any], tensors: Mapping[str, LazyTensor] | None = None) -> list[float]:
    """The learning rates of the optimizers' parameter groups, each once; else those that schedulers gave last.

    Args:
        objects: state that is no tensor, by name.
        tensors: of training state, by name; a rate may be one.
    """
    found: list[float] = []
    last: list[float] = []
    for path, value in _parts(objects):
        if _RATE.search(path):
            found += _numbers(value)
        elif path.endswith("._last_lr") and isinstance(value, (list, tuple)):
            last += [number for each in value for number in _numbers(each)]
    for name, tensor in (tensors or {}).items():
        if name.endswith(".lr") and _RATE.search(name):
            found += _numbers(tensor)
    return list(dict.fromkeys(found or last))


def loss_scale(objects: Mapping[str, Any], tensors: Mapping[str, LazyTensor] | None = None) -> float | None:
    """The loss scale, None if there is none.

    Args:
        objects: state that is no tensor, by name.
        tensors: of training state, by name; the scale may be one.
    """
    for _, value in _parts(objects):
        fields = value.fields() if isinstance(value, Record) else value
        if not isinstance(fields, dict):
            continue
        for key, beside in _SCALES.items():
            if key in fields and (not beside or any(name in fields for name in beside)):
                for number in _numbers(fields[key]):
                    return number
    known = tensors or {}
    for name, tensor in known.items():
        holder, _, key = name.rpartition(".")
        if key in _SCALES and (
            holder.endswith("scaler") or any(f"{holder}.{other}" in known for other in _SCALES[key])
        ):
            for number in _numbers(tensor):
                return number
    return None


def _parts(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every part of the objects with its dotted path, as far down and as many as training state has."""
    todo: list[tuple[str, Any, int]] = []
    left = _MOST
    for name in objects:
        try:
            todo.append((name, objects[name], 0))
        except LastingError:  # what is damaged is told elsewhere
            continue
    todo.reverse()
    while todo and left > 0:
        left -= 1
        path, value, depth = todo.pop()
        value = view(value)
        yield path, value
        inside: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            inside = list(value.items())
        elif isinstance(value, Record):
            inside = list(value.fields().items())
        elif isinstance(value, (list, tuple)):
            inside = list(enumerate(value))
        if depth < _DEEPEST and len(inside) < left:
            todo += [(f"{path}.{key}", part, depth + 1) for key, part in reversed(inside) if _may_hold(key, part)]


def _may_hold(key: Any, part: Any) -> bool:
    """Whether a part may be, or have inside, what is looked for; a parameter group may list a million numbers."""
    return isinstance(part, (dict, list, tuple, Record)) or key == "lr"


def _numbers(value: Any) -> list[float]:
    """A number as a list of it; none of what is no number."""
    if isinstance(value, LazyTensor) and value.size == 1:
        try:
            value = value.numpy().reshape(-1)[0].item()
        except (LastingError, OSError):
            return []
    value = view(value)
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [float(value)] if is_number and abs(value) < 1e300 and math.isfinite(value) else []
