"""Universal checkpoints: a folder per parameter with ``fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``.

Facts: ``checkpoint/ds_to_universal.py`` of DeepSpeed 0.10 to 0.19: each file is ``{"param": tensor, ...}``, the whole
parameter in its own shape, and ``step.pt`` a number or a tensor of one.
"""

from __future__ import annotations

import re
from typing import Any

from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.errors import FormatError
from anyckpt.optimizer.state import whole_number
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor

_WEIGHT = "fp32"
_STEP = "step"
_SLOT = re.compile(r"(\w{1,60})\.pt", re.ASCII)
_AGAIN = "convert it to a universal checkpoint again, or copy it again"


def read_parameters(
    folder: Location, opened: list[TorchContents], state: str
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor], int | None]:
    """Weights by name, the optimizer's state by ``STATE.NAME.SLOT``, and the optimizer's step.

    Args:
        folder: that of the parameters.
        opened: gets each file.
        state: what names of the optimizer's state begin with.

    Raises:
        FormatError: a parameter lacks its weight or a state that others have, shapes differ, or steps do.
    """
    weights: dict[str, LazyTensor] = {}
    states: dict[str, LazyTensor] = {}
    steps: set[int] = set()
    slots: dict[str, set[str]] = {}
    for name in folder.names:
        if not folder.is_folder(name):
            continue
        inner = folder.join(name)
        own = {match[1]: match[0] for file in folder.names_in(name) if (match := _SLOT.fullmatch(file))}
        contents = dict(zip(own, read_torch_files(folder.open(name, file) for file in own.values()), strict=True))
        opened += contents.values()
        if _WEIGHT not in own:
            raise FormatError("has no weight", path=inner, tensor=name, expected=f"{_WEIGHT}.pt", remedy=_AGAIN)
        for slot, file in own.items():
            value = _value(contents[slot])
            if slot == _STEP:
                number = whole_number(value)
                steps.update(() if number is None else (number,))
            elif not isinstance(value, LazyTensor):
                raise FormatError(
                    "holds no tensor", path=folder.join(name, file), tensor=name, expected="'param'", remedy=_AGAIN
                )
            elif slot == _WEIGHT:
                weights[name] = value
            else:
                states[f"{state}.{name}.{slot}"] = value
                slots.setdefault(slot, set()).add(name)
        for slot in own.keys() - {_STEP, _WEIGHT}:
            found = states[f"{state}.{name}.{slot}"]
            if found.shape != weights[name].shape:
                raise FormatError(
                    f"its {slot} does not fit its weight",
                    path=inner,
                    tensor=name,
                    expected=weights[name].shape,
                    found=found.shape,
                    remedy=_AGAIN,
                )
    for slot, names in slots.items():
        if len(names) < len(weights):
            raise FormatError(
                f"lacks the {slot} that other parameters have",
                path=folder.path,
                tensor=min(weights.keys() - names),
                remedy=_AGAIN,
            )
    if len(steps) > 1:
        raise FormatError("is of different optimizer steps", path=folder.path, found=sorted(steps)[:5], remedy=_AGAIN)
    return weights, states, next(iter(steps), None)


def _value(contents: TorchContents) -> Any:
    return contents.root.get("param") if isinstance(contents.root, dict) else contents.root
