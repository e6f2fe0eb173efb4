"""Experts whose gate and up are one tensor at the hub, row by row, as GPT-OSS has them: apart in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, stack

JOINED = {"ffn_gate_up_exps": "mlp.experts.gate_up_proj", "ffn_down_exps": "mlp.experts.down_proj"}
"""What ``joined`` calls a tensor -> at the hub, without the end of a bias."""

_GATE = re.compile(r"(blk\.\d+\.ffn_)(gate|up|down)(_exps)\.(weight|bias)", re.ASCII)
_HUB = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", re.ASCII)


def joined(tensors: Mapping[str, LazyTensor], path: str) -> dict[str, LazyTensor]:
    """The tensors of a file with gate and up as one, ``[experts, inputs, outputs]``, or ``[experts, outputs]`` biases.

    Raises:
        MappingError: one of the two is missing, or of another shape.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _GATE.fullmatch(name)
        if match is None:
            found[name] = tensor
        elif match[2] == "gate":
            other = tensors.get(f"{match[1]}up{match[3]}.{match[4]}")
            if other is None or other.shape != tensor.shape or tensor.ndim < 2:
                raise MappingError("has no ffn_up_exps of its shape beside it", path=path, tensor=name)
            experts, rows, *rest = tensor.shape
            both = stack([tensor, other.cast(tensor.dtype)], 2).reshape((experts, 2 * rows, *rest))
            found[f"{match[1]}gate_up{match[3]}.{match[4]}"] = _turned(both)
        elif match[2] == "down":
            found[name] = _turned(tensor)
        elif f"{match[1]}gate{match[3]}.{match[4]}" not in tensors:
            raise MappingError("has no ffn_gate_exps beside it", path=path, tensor=name)
    return found


def apart(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The hub's tensors with those of experts as a file has them, under its names."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        match = _HUB.fullmatch(name)
        if match is None or tensor.ndim != (2 if match[3] else 3):
            found[name] = tensor
            continue
        stored, ending = f"blk.{match[1]}.ffn_", "bias" if match[3] else "weight"
        turned = _turned(tensor)
        if match[2] == "down":
            found[f"{stored}down_exps.{ending}"] = turned
            continue
        experts, rows, *rest = turned.shape
        pairs = turned.reshape((experts, rows // 2, 2, *rest))
        for at, which in enumerate(("gate", "up")):
            found[f"{stored}{which}_exps.{ending}"] = pairs[:, :, at]
    return found


def _turned(tensor: LazyTensor) -> LazyTensor:
    return tensor.permute((0, 2, 1)) if tensor.ndim == 3 else tensor
