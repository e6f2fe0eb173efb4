"""What ``distrib_optim.pt`` holds, in all the forms that the distributed optimizer has written it.

====================  ==================================================================================================
since                 form
====================  ==================================================================================================
Megatron-LM 23.06     one tensor for each chunk and slot, by the gradients' element type; padded at its end
Megatron-Core 0.4     a tensor for each bucket, each padded; ``per_bucket_numel`` lists how long they are
Megatron-Core 0.5     the same, and ``per_bucket_numel_unpadded``
Megatron-Core 0.6     the same, by the element types of parameters and gradients
Megatron-Core 0.7     one tensor for each buffer and slot without padding (``buckets_coalesced``)
====================  ==================================================================================================

Padding is to a multiple of the data-parallel ranks that shared the buffer.

Facts: ``save_parameter_state`` and ``get_parameter_state_dp_zero`` of ``distrib_optimizer.py`` in these releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.optimizer.state import unproved
from anyckpt.pickling import Global
from anyckpt.tensor import LazyTensor

SLOTS = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Our names of the slots, and the distributed optimizer's."""


@dataclass(frozen=True)
class FlatBuffer:
    """One buffer.

    Attributes:
        kind: element type of its parameters, or of their gradients.
        of_gradients: ``kind`` is that of the gradients.
        slots: slot -> its buckets, or one tensor of them all.
        coalesced: buckets were put together without their padding.
        unpadded: elements of each bucket without padding, None where the file does not say.
    """

    kind: str
    of_gradients: bool
    slots: Mapping[str, tuple[LazyTensor, ...]]
    coalesced: bool
    unpadded: tuple[int, ...] | None

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor of a slot."""
        return [tensor.size for tensor in self.slots["master"]]


def flat_buffers(state: Any, path: str) -> list[FlatBuffer]:
    """The buffers of one optimizer, in order.

    Args:
        state: what the file holds of it.
        path: the rank's file, for messages.

    Raises:
        MappingError: it is no such state, or slots differ in size.
    """
    if not isinstance(state, dict) or not any(type(key) is int for key in state):
        found = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        raise unproved(
            "the distributed optimizer's state is of a layout that is not understood",
            path=path,
            expected="flat buffers by number, as Megatron-LM writes them since mid-2023",
            found=found,
        )
    found_buffers: list[FlatBuffer] = []
    coalesced = state.get("buckets_coalesced") is True
    for number in sorted(key for key in state if type(key) is int):
        entries = state[number].items() if isinstance(state[number], dict) else ()
        if not entries:
            raise _malformed(number, path)
        for kinds, contents in entries:
            kind = kinds[0] if isinstance(kinds, tuple) and kinds else kinds
            if not isinstance(kind, Global) or not isinstance(contents, dict):
                raise _malformed(number, path)
            unpadded = _unpadded(state.get("per_bucket_numel_unpadded"), number, kinds)
            slots = {slot: _tensors(contents, key, number, path) for slot, key in SLOTS.items()}
            buffer = FlatBuffer(kind.name, not isinstance(kinds, tuple), slots, coalesced, unpadded)
            _check(buffer, contents.get("numel_unpadded"), number, path)
            found_buffers.append(buffer)
    return found_buffers


def _malformed(number: int, path: str) -> MappingError:
    return unproved("a buffer of the distributed optimizer is malformed", path=path, found=f"buffer {number}")


def _tensors(contents: Mapping[Any, Any], key: str, number: int, path: str) -> tuple[LazyTensor, ...]:
    """A slot's buckets."""
    value = contents.get(key)
    tensors = value if isinstance(value, list) else [value]
    flat = [tensor for tensor in tensors if isinstance(tensor, LazyTensor) and tensor.ndim == 1]
    if not flat or len(flat) < len(tensors):
        raise unproved(
            f"a buffer of the distributed optimizer has no whole {key}",
            path=path,
            expected="one axis, of each bucket",
            found=f"buffer {number}: {type(value).__name__}",
        )
    return tuple(flat)


def _unpadded(table: Any, number: int, kinds: Any) -> tuple[int, ...] | None:
    """Elements of each of a buffer's buckets, from the table of all buffers."""
    own = table[number] if isinstance(table, list) and number < len(table) else None
    sizes = own.get(kinds) if isinstance(own, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        return None
    return tuple(sizes)


def _check(buffer: FlatBuffer, elements: Any, number: int, path: str) -> None:
    """Raise MappingError unless slots have the same buckets, as long as the file says."""
    for slot, tensors in buffer.slots.items():
        sizes = [tensor.size for tensor in tensors]
        stated = elements if buffer.coalesced and type(elements) is int else None
        if sizes != buffer.sizes or stated not in (None, sum(sizes)):
            raise unproved(
                f"a buffer of the distributed optimizer has no whole {slot}",
                path=path,
                expected=f"{buffer.sizes if stated is None else stated} elements",
                found=f"buffer {number}: {sizes}",
            )
    if buffer.unpadded is not None and (
        len(buffer.unpadded) != len(buffer.sizes)
        or any(own > size for own, size in zip(buffer.unpadded, buffer.sizes, strict=True))
    ):
        raise unproved(
            "the buckets of the distributed optimizer are not as long as it says",
            path=path,
            expected=f"{len(buffer.unpadded)} buckets, of at least {list(buffer.unpadded)[:5]} elements",
            found=f"buffer {number}: {buffer.sizes[:5]}",
        )
