"""Which layers each stage of a pipeline has, as the files hold them or as the run was told to divide them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from anyckpt.checkpoint import Checkpoint, RankShard
from anyckpt.config import of_ranks
from anyckpt.errors import LastingError
from anyckpt.layout.pipeline import Chunk, chunks
from anyckpt.operations.steps.joining import geometry_of, parallelism_of

_LAYER = re.compile(r"(encoder|decoder|mtp)\.layers\.(\d{1,6})\.")
_STACKS = ("encoder", "decoder", "mtp")


def stages_of(checkpoint: Checkpoint) -> tuple[Chunk, ...]:
    """The chunks of a checkpoint's pipeline, in the order in which data flows; none if there is no pipeline.

    Args:
        checkpoint: as read, with the ranks' shards if its files are of ranks.
    """
    if checkpoint.layout.pipeline_parallel == 1:
        return ()
    if checkpoint.ranks:
        return held_by(checkpoint.ranks)
    if checkpoint.config_kind not in of_ranks.KINDS:
        return ()
    try:
        geometry = geometry_of(checkpoint)
        stacks = {"decoder": geometry.num_layers, "mtp": geometry.mtp_num_layers}
        known = {name: count for name, count in stacks.items() if count}
        return chunks(parallelism_of(checkpoint), known) if "decoder" in known else ()
    except LastingError:  # words that contradict one another say nothing of the files, which are not divided so
        return ()


def held_by(ranks: Sequence[RankShard]) -> tuple[Chunk, ...]:
    """The chunks that files hold: each has the layers that follow those of the chunk before it."""
    found: dict[tuple[int, int], list[RankShard]] = {}
    for shard in ranks:
        found.setdefault((shard.virtual_rank, shard.pipeline_rank), []).append(shard)
    at = dict.fromkeys(_STACKS, 0)
    result = []
    for (virtual_rank, pipeline_rank), shards in sorted(found.items()):
        names = {name for shard in shards for name in shard.tensors}
        counts = dict.fromkeys(_STACKS, 0)
        for name in names:
            if layer := _LAYER.match(name):
                counts[layer[1]] = max(counts[layer[1]], int(layer[2]) + 1)
        layers = {stack: range(at[stack], at[stack] + counts[stack]) for stack in _STACKS}
        embedding = any(name.startswith("embedding.") for name in names)
        output = any(name.startswith("output_layer.") for name in names)
        norms = frozenset(stack for stack in _STACKS if any(name.startswith(f"{stack}.final_") for name in names))
        result.append(Chunk(pipeline_rank, virtual_rank, layers, embedding, output, norms))
        for stack in _STACKS:
            at[stack] += counts[stack]
    return tuple(result)
