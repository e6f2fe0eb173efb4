"""Where parameters lie in one flat buffer of Megatron's distributed optimizer.

The last registered parameter comes first.  Each starts at a multiple of 64 elements (core 0.7: anywhere), counted
from the start of its bucket.  Nothing names them: the elements must add up, and where the file has a piece for each
parameter, which ``dp_reshardable`` does, every parameter must begin and end with pieces.

Facts: ``_ParamAndGradBuffer`` of ``megatron/core/distributed/param_and_grad_buffer.py``, core 0.7 to 0.16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.indexing import Shape
from anyckpt.optimizer.buffers import Rule, starts
from anyckpt.optimizer.state import unproved
from anyckpt.tensor import LazyTensor, Mosaic

_ALIGNMENTS = (64, 1)

Start = tuple[int, int]
"""Bucket, and first element in it."""
Parameters = Mapping[str, Shape]
"""Shape of each parameter by a name of its own, in the order in which modules register them."""


@dataclass
class Buffer:
    """One flat buffer.

    Attributes:
        types: element types of parameters and gradients: ``(torch.bfloat16, torch.float32)``.
        buckets: slot -> number -> elements of that bucket; all of them under 0 if the file does not divide them.
        divided: the file has a tensor for each bucket.
    """

    types: str
    buckets: dict[str, dict[int, LazyTensor]]
    divided: bool

    @property
    def dtype(self) -> str:
        """Element type of the parameters."""
        return self.types.strip("()").split(",")[0].strip().removeprefix("torch.")

    def sizes(self, what: str, path: str) -> list[int]:
        """Elements of each bucket.

        Raises:
            FormatError: a bucket is missing, or slots differ.
        """
        found = [{number: t.size for number, t in sorted(own.items())} for own in self.buckets.values()]
        if len(found) != 3 or any(one != found[0] or list(one) != list(range(len(one))) for one in found):
            raise FormatError(
                f"{what}: buckets of the distributed optimizer are missing, or differ between its tensors", path=path
            )
        return list(found[0].values())

    def cut(self, slot: str, where: Mapping[str, Start], parameters: Parameters) -> dict[str, LazyTensor]:
        """Each parameter's part of a slot."""
        return {
            name: self.buckets[slot][bucket].narrow(0, first, math.prod(parameters[name])).reshape(parameters[name])
            for name, (bucket, first) in where.items()
        }


def placed(buffer: Buffer, parameters: Parameters, shared_embedding: bool, what: str, path: str) -> dict[str, Start]:
    """Where each parameter lies.

    Args:
        buffer: the buffer.
        parameters: what it holds.
        shared_embedding: first and last pipeline stage share the embedding, which then has a bucket of its own.
        what: the buffer, for messages.
        path: file, for messages.

    Raises:
        FormatError: a bucket is missing.
        MappingError: the numbers of elements do not add up, or pieces of the file contradict.
    """
    sizes = buffer.sizes(what, path)
    for alignment in _ALIGNMENTS:
        found = (
            _in_buckets(parameters, sizes, alignment)
            if buffer.divided
            else _in_whole(parameters, sizes[0], alignment, shared_embedding)
        )
        if found is not None and _fits_pieces(buffer, found, parameters):
            return found
    least = sum(math.prod(shape) for shape in parameters.values())
    raise unproved(
        f"{what} of the distributed optimizer does not fit the model's parameters",
        path=path,
        expected=f"{len(parameters)} parameters of {least} elements, each from a multiple of 64 on",
        found=f"{sum(sizes)} elements in {len(sizes)} buckets",
    )


def _in_buckets(parameters: Parameters, sizes: Sequence[int], alignment: int) -> dict[str, Start] | None:
    """Places in buckets of known sizes, None if they do not fit; a bucket may end with the gap before the next one."""
    places: dict[str, Start] = {}
    bucket = position = 0
    for name in reversed(list(parameters)):
        first = -(-position // alignment) * alignment
        if position and bucket < len(sizes) and sizes[bucket] in (position, first):
            bucket, first = bucket + 1, 0
        position = first + math.prod(parameters[name])
        if bucket >= len(sizes) or position > sizes[bucket]:
            return None
        places[name] = (bucket, first)
    return places if bucket == len(sizes) - 1 and position == sizes[bucket] else None


def _in_whole(parameters: Parameters, total: int, alignment: int, shared_embedding: bool) -> dict[str, Start] | None:
    """Places in buckets that the file does not tell apart, None if they do not fill the buffer."""
    reverse = [(name, math.prod(parameters[name])) for name in reversed(list(parameters))]
    alone = tuple(name for name, _ in reverse if name.endswith((EMBEDDING, HEAD))) if shared_embedding else ()
    firsts, elements = starts(reverse, Rule(alignment, shared=alone))
    return {name: (0, first) for (name, _), first in zip(reverse, firsts, strict=True)} if elements == total else None


def _fits_pieces(buffer: Buffer, places: Mapping[str, Start], parameters: Parameters) -> bool:
    """Every parameter begins where a stored piece begins and ends where one ends."""
    for own in buffer.buckets.values():
        for number, tensor in own.items():
            if not buffer.divided or not isinstance(tensor, Mosaic):
                continue
            begins, ends = set(tensor.starts[:, 0].tolist()), set(tensor.stops[:, 0].tolist())
            for name, (bucket, first) in places.items():
                size = math.prod(parameters[name])
                if bucket == number and size and (first not in begins or first + size not in ends):
                    return False
    return True
