"""Where parameters lie in the flat buffers of the distributed optimizer (``distrib_optim.pt``).

A buffer holds the parameters of one chunk and one element type, the last registered first.  Since Megatron-Core 0.8
each starts at a multiple of 64 elements.  Buckets divide the buffer: one that reached its size is closed, and an
embedding that is shared between pipeline stages has one of its own.  The ends of buckets are padded in memory, to
multiples of at least 128, and the file leaves that padding out; so positions restart at each bucket.

Before 0.7 the file has each bucket by itself, with its padding to a multiple of the data-parallel ranks, and nothing
lies between parameters.

Facts: ``_ParamAndGradBuffer`` in ``megatron/core/distributed/param_and_grad_buffer.py`` of 0.6 to 0.16, and before
``GradBuffer`` in ``grad_buffer.py`` (0.4, 0.5) and ``megatron/model/distributed.py`` (23.06).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.config.hub_names import EMBEDDING, HEAD
from anyckpt.data_classes import dataclass
from anyckpt.optimizer.rank_parameters import Parameter
from anyckpt.optimizer.state import unproved

_ALIGNMENT = 64
_MOST_WAYS = 64
_SHARED = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Rule:
    """How a buffer is filled.

    Attributes:
        alignment: elements to whose multiples each parameter's start is rounded up.
        bucket: elements after which a bucket is closed, None for no limit.
        shared: names of parameters that have a bucket of their own.
    """

    alignment: int = _ALIGNMENT
    bucket: int | None = None
    shared: tuple[str, ...] = ()


def starts(sizes: Sequence[tuple[str, int]], rule: Rule) -> tuple[list[int], int]:
    """First element of each parameter in the file's buffer, and the elements of the buffer.

    Args:
        sizes: name and elements of each parameter, in the order in which they lie there.
        rule: how the buffer is filled.
    """
    found: list[int] = []
    before, inside = 0, 0  # elements in closed buckets, and in the open one
    for name, size in sizes:
        alone = name in rule.shared
        inside = -(-inside // rule.alignment) * rule.alignment
        if alone and inside:
            # The bucket is closed where the next parameter would have begun.
            before, inside = before + inside, 0
        found.append(before + inside)
        inside += size
        if alone or (rule.bucket is not None and inside >= rule.bucket):
            before, inside = before + inside, 0
    return found, before + inside


def rules(arguments: Mapping[str, Any], *, first_chunk: bool, shared: bool) -> Iterator[Rule]:
    """The rules that may have been followed, the likeliest first.

    Args:
        arguments: of the training run.
        first_chunk: it is the first chunk of the first pipeline stage; elsewhere buckets have no limit.
        shared: the embedding is shared between pipeline stages.
    """
    alone = _SHARED if shared else ()
    if arguments.get("overlap_grad_reduce") and first_chunk:
        replicas = _count(arguments.get("data_parallel_size")) * _count(arguments.get("context_parallel_size"))
        stated = arguments.get("ddp_bucket_size")
        yield Rule(
            bucket=stated if type(stated) is int and stated > 0 else max(40_000_000, 1_000_000 * replicas), shared=alone
        )
    yield Rule(shared=alone)
    yield Rule(alignment=1)


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 1


def place(
    parameters: Sequence[Parameter], elements: int, candidates: Iterator[Rule], path: str
) -> dict[Parameter, int]:
    """First element of each parameter, by the first rule that fills the buffer exactly.

    Raises:
        MappingError: none does.
    """
    reverse = list(reversed(parameters))
    sizes = [(parameter.name, parameter.weight.size) for parameter in reverse]
    totals: list[int] = []
    for rule in candidates:
        found, total = starts(sizes, rule)
        if total == elements:
            return dict(zip(reverse, found, strict=True))
        totals.append(total)
    raise unproved(
        "a buffer of the distributed optimizer does not fit the model's parameters",
        path=path,
        expected=f"{' or '.join(str(total) for total in dict.fromkeys(totals))} elements for {len(sizes)} parameters",
        found=elements,
    )


def place_in_buckets(
    parameters: Sequence[Parameter],
    sizes: Sequence[int],
    unpadded: Sequence[int] | None,
    replicas: Sequence[int],
    path: str,
) -> dict[Parameter, tuple[int, int]]:
    """Bucket and first element of each parameter, where the file has each bucket by itself.

    Args:
        parameters: those of the buffer, in the order in which modules register them.
        sizes: elements of each bucket.
        unpadded: the same without padding, None where the file does not say.
        replicas: data-parallel ranks to whose multiple buckets may be padded.
        path: file, for messages.

    Raises:
        MappingError: no division into buckets fits, or several do.
    """
    reverse = list(reversed(parameters))
    counts = [parameter.weight.size for parameter in reverse]
    if unpadded is not None:
        found = _divisions(counts, unpadded, 1)
    else:
        found = []
        for multiple in dict.fromkeys((1, *replicas)):
            found += [ends for ends in _divisions(counts, sizes, multiple) if ends not in found]
    if len(found) != 1:
        raise unproved(
            "the buckets of the distributed optimizer do not fit the model's parameters"
            if not found
            else "the model's parameters fit the buckets of the distributed optimizer in several ways",
            path=path,
            expected=f"{sum(counts)} elements of {len(counts)} parameters, buckets padded to multiples of "
            f"{' or '.join(map(str, replicas)) or 'the data-parallel ranks'}",
            found=f"{sum(sizes)} elements in {len(sizes)} buckets",
        )
    places: dict[Parameter, tuple[int, int]] = {}
    first = 0
    for bucket, end in enumerate(found[0]):
        position = 0
        for parameter, count in zip(reverse[first:end], counts[first:end], strict=True):
            places[parameter] = (bucket, position)
            position += count
        first = end
    return places


def _divisions(counts: Sequence[int], sizes: Sequence[int], multiple: int) -> list[tuple[int, ...]]:
    """How many parameters lie before the end of each bucket, in at most two ways that fit.

    Args:
        counts: elements of each parameter.
        sizes: elements of each bucket.
        multiple: what buckets are padded to.
    """
    ways: list[tuple[int, ...]] = [()]
    for size in sizes:
        longer: list[tuple[int, ...]] = []
        for way in ways:
            end, total = (way[-1] if way else 0), 0
            while end < len(counts) and total + counts[end] <= size:
                total += counts[end]
                end += 1
                if -(-total // multiple) * multiple == size:
                    longer.append((*way, end))
        ways = longer[:_MOST_WAYS]
    return [way for way in ways if way and way[-1] == len(counts)][:2]
