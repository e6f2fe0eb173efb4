"""A live tensor's memory as one axis."""

from __future__ import annotations

import torch


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor as one axis, in its own memory.

    ``view(-1)`` keeps the stride of an axis of one element, whatever that is, and then no other type can be seen there.
    """
    return tensor.as_strided((tensor.numel(),), (1,))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor's elements as one axis, in its own memory."""
    return in_order(tensor).view(torch.uint8)
