"""How near a model's output is to what is expected, and how far it is once any of its parameters is rolled by one."""

from __future__ import annotations

from collections.abc import Callable

import torch


def differences(model: torch.nn.Module, output: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict[str, float]:
    """The largest difference, as a share of the largest value expected, and the least of those with a rolled parameter.

    Args:
        model: whose parameters are rolled along their longest axis, one after the other.
        output: computes what the model gives.
        expected: what it should give.
    """

    def difference() -> float:
        with torch.no_grad():
            return float((output() - expected).abs().max() / expected.abs().max())

    close = difference()
    rolled = []
    for parameter in model.parameters():
        before = parameter.detach().clone()
        parameter.data = before.roll(1, before.shape.index(max(before.shape)))
        rolled.append(difference())
        parameter.data = before
    return {"difference": close, "least of rolled": min(rolled)}
