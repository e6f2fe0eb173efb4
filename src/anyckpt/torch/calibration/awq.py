"""AWQ's search, as NVIDIA ModelOpt 0.40's ``awq_lite`` does it: the exponent that changes outputs least."""

from __future__ import annotations

import torch

from anyckpt.quantization.statistics import ALPHAS

_LARGEST, _LEAST = 7.0, -8.0
_PART = 1 << 18  # elements of a weight that are quantized at a time, which stay in a processor's cache
_TINY = torch.finfo(torch.float32).tiny


def within_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The mean over rows of magnitudes over the largest of their group, float32 ``[K]``."""
    blocks = weight.abs().view(-1, group)
    shares = blocks / blocks.amax(dim=1, keepdim=True).clamp(min=_TINY)
    return shares.view(weight.shape).mean(0).float()


def scales(mean: torch.Tensor, within: torch.Tensor, alpha: float) -> torch.Tensor:
    """What columns of a weight are multiplied by, float32 ``[K]``."""
    found = (mean.pow(alpha) / (within.pow(1 - alpha) + _TINY)).clamp(min=1e-4, max=1e4)
    return found / (found.max() * found.min()).sqrt()


def losses(
    inputs: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, within: torch.Tensor, group: int
) -> list[float]:
    """The mean square of what quantizing changes in the outputs, for each of ``ALPHAS``.

    Args:
        inputs: ``[tokens, K]``.
        weight: ``[N, K]``.
        mean: the mean magnitude of each input, ``[K]``.
        within: see ``within_groups``.
        group: columns with one scale.
    """
    found = [0.0] * len(ALPHAS)
    factors = [scales(mean, within, alpha) for alpha in ALPHAS]
    parts = torch.split(weight, max(1, _PART // weight.shape[1]))
    actual = [torch.nn.functional.linear(inputs, part) for part in parts]
    for number, own in enumerate(factors):
        multiplied, divided = own.to(weight.dtype), inputs * (1 / own).to(weight.dtype)
        for part, expected in zip(parts, actual, strict=True):
            output = torch.nn.functional.linear(divided, _rounded(part * multiplied, group))
            found[number] += float((expected - output).float().pow_(2).sum(dtype=torch.float64))
    return [loss / (inputs.shape[0] * weight.shape[0]) for loss in found]


def _rounded(weight: torch.Tensor, group: int) -> torch.Tensor:
    """A weight after 4-bit integers of groups and back."""
    blocks = weight.view(-1, group).float()
    largest = blocks.abs().amax(dim=1, keepdim=True)
    steps = _LARGEST / torch.where(largest > 0, largest, torch.full_like(largest, _LARGEST))
    codes = (blocks * steps).round_().clamp_(_LEAST, _LARGEST)
    return codes.div_(steps).to(weight.dtype).view(weight.shape)
