"""Whether the scales of quantized weights can be scales: numbers that are finite and not negative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.quantization import trtllm
from anyckpt.quantization.methods import Facts, Scheme, schemes_of
from anyckpt.quantization.numbers import values_of
from anyckpt.quantization.weights import OF_ACTIVATIONS
from anyckpt.tensor import LazyTensor

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Scale:
    """A scale's name and what is wrong with its numbers, None if nothing is."""

    name: str
    problem: str | None


def scales_checked(tensors: Mapping[str, LazyTensor], facts: Facts) -> Iterator[Scale]:
    """Every scale of weights and activations, read in blocks; none if the method is not understood.

    Args:
        tensors: as they are stored.
        facts: the configuration's ``quantization_config``.

    Raises:
        FormatError: bytes are missing from a file.
    """
    try:
        schemes = schemes_of(facts)
    except MappingError:
        return
    own = facts.get("quant_method") == trtllm.METHOD
    of_inputs = (*trtllm.OF_ACTIVATIONS, trtllm.PREQUANT) if own else OF_ACTIVATIONS
    of_weights = tuple(part for scheme in schemes for part in scheme.of_scales)
    plain = [scheme for scheme in schemes if isinstance(scheme, Scheme)]
    exponents = tuple(scheme.scales for scheme in plain if scheme.exponents)
    divisors = (*of_inputs, *(scheme.common for scheme in plain if scheme.divided))
    for name, tensor in tensors.items():
        exponent = name.endswith(exponents) and tensor.dtype.itemsize == 1
        if name.endswith((*of_weights, *of_inputs)) and (tensor.dtype.is_floating or exponent):
            yield Scale(name, _problem(tensor, name.endswith(divisors)))


def _problem(tensor: LazyTensor, divides: bool) -> str | None:
    """What is wrong with the numbers; a row of zeros may have the scale 0, by which nothing is divided."""
    strange = negative = zeros = 0
    for block in tensor.chunks(_BLOCK):
        numbers = values_of(tensor.dtype)[block.view("u1")] if tensor.dtype.itemsize == 1 else block.astype(np.float32)
        strange += int(np.count_nonzero(~np.isfinite(numbers)))
        negative += int(np.count_nonzero(numbers < 0))
        zeros += int(np.count_nonzero(numbers == 0))
    said = [
        f"{count:,} of {tensor.size:,} {what}"
        for count, what in (
            (strange, "are infinite or no numbers"),
            (negative, "are negative"),
            (zeros * divides, "are zero"),
        )
        if count
    ]
    return f"its scales are not possible: {', '.join(said)}" if said else None
