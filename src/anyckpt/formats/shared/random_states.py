"""States of random-number generators, each of one rank, under names that say of which and of how many.

A distributed checkpoint of Megatron-Core calls them ``rng_state/shard_<stage>.<tensor rank>_<stages>.<tensor ranks>``;
a rank's file of Megatron-LM has its own as ``rng_state``, which is called ``mp_rank_01_000/rng_state`` once read.
The former is the name that they travel under; with expert parallelism the expert rank and size come third.

Facts: ``get_rng_state`` of ``megatron/training/checkpointing.py``, core 0.5 to 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyckpt.checkpoint import ParallelLayout

_OF_A_FOLDER = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?/rng_state", re.ASCII)
_OF_A_PLACE = re.compile(r"rng_state/shard_[\d.]+_[\d.]+", re.ASCII)


def is_random_state(name: str) -> bool:
    """An object of this name is one, by the name that it travels under."""
    return _OF_A_PLACE.fullmatch(name) is not None


def place_name(tensor: int, pipeline: int, expert: int, layout: ParallelLayout) -> str:
    """The name of a rank's state."""
    place, sizes = [pipeline, tensor], [layout.pipeline_parallel, layout.tensor_parallel]
    if layout.expert_parallel > 1:
        place, sizes = [*place, expert], [*sizes, layout.expert_parallel]
    return f"rng_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, sizes))}"


def random_states(names: Iterable[str], layout: ParallelLayout) -> dict[str, str]:
    """The names that random states travel under -> the names that they have.

    Args:
        names: of a checkpoint's objects.
        layout: of the files, which says what the numbers of a rank's folder are.
    """
    found: dict[str, str] = {}
    for name in names:
        folder = _OF_A_FOLDER.fullmatch(name)
        if folder is None:
            if is_random_state(name):
                found[name] = name
            continue
        numbers = [int(number) for number in folder.groups()[1:] if number is not None]
        pipeline = numbers.pop(0) if layout.pipeline_parallel > 1 and numbers else 0
        expert = numbers.pop(0) if layout.expert_parallel > 1 and numbers else 0
        if not numbers:
            found[place_name(int(folder[1]), pipeline, expert, layout)] = name
    return found
