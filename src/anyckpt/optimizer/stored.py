"""What files of ranks have in common, whichever software wraps PyTorch's optimizer in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.indexing import Shape
from anyckpt.optimizer.state import unproved
from anyckpt.tensor import LazyTensor

HALF = ("bfloat16", "float16")
"""Element types of weights that an optimizer keeps a float32 copy of."""


def inner(container: Mapping[Any, Any]) -> Any:
    """The state of the optimizer that another one wraps, the container itself if none does."""
    return next((container[key] for key in ("optimizer", "optimizer_state_dict") if key in container), container)


def masters(container: Mapping[Any, Any]) -> Any:
    """The float32 copies of weights of 16 bits, group by group; None where nothing keeps them apart."""
    return next((container[key] for key in ("fp32_from_fp16_params", "fp32_from_fp16") if key in container), None)


def masters_of_group(masters: Any, number: int, halves: int, path: str) -> list[Any]:
    """Those of one group, in order; none where nothing keeps them apart.

    Args:
        masters: as :func:`masters` gives them.
        number: the group's.
        halves: how many parameters of 16 bits it has.
        path: file, for messages.

    Raises:
        MappingError: they are not as many.
    """
    if masters is None:
        return []
    own = masters[number] if isinstance(masters, list) and number < len(masters) else None
    if not isinstance(own, list) or len(own) != halves:
        raise unproved(
            f"the float32 weights of parameter group {number} do not fit the model",
            path=path,
            expected=f"{halves}, one for each parameter of 16 bits",
            found=len(own) if isinstance(own, list) else "none",
        )
    return [*own]


def fitting(slots: Mapping[str, Any], shape: Shape, name: str, path: str) -> dict[str, LazyTensor]:
    """A parameter's slots, each a tensor of floating-point numbers of this shape.

    Raises:
        MappingError: one is not.
    """
    for slot, tensor in slots.items():
        if not isinstance(tensor, LazyTensor) or tensor.shape != shape or not tensor.dtype.is_floating:
            found = f"{tensor.dtype.name} {tensor.shape}" if isinstance(tensor, LazyTensor) else type(tensor).__name__
            raise unproved(
                f"the optimizer's {slot} does not fit its parameter",
                path=path,
                tensor=name,
                expected=f"a tensor of shape {shape}",
                found=found,
            )
    return dict(slots)
