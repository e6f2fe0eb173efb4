"""A picture of a pipeline: a line for each rank, a place for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.checkpoint.grouping import numbers_told
from anyckpt.cli.tables import sign

_WIDEST = 64
_NARROWEST = 8
_STACKS = ("encoder", "decoder", "mtp")
_TITLES = {"encoder": "encoder layer", "decoder": "layer", "mtp": "multi-token layer"}


def stages_line(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages in a few words where a picture would say no more; empty where it would."""
    counts = {sum(map(len, stage["layers"].values())) for stage in stages}
    if len(counts) != 1 or any(stage["virtual_rank"] for stage in stages):
        return ""
    count = counts.pop()
    return f"{len(stages)} stages of {count} layer{'s' * (count != 1)}"


def stages_picture(stages: Sequence[Mapping[str, Any]], room: int | None) -> list[str]:
    """Lines: a rank of the pipeline, where its layers lie among all, and which these are.

    Args:
        stages: ``Inspection.stages``.
        room: characters in a line, None for as many as are needed.
    """
    places = _places(stages)
    ranks = sorted({stage["pipeline_rank"] for stage in stages})
    told = {rank: _told([stage for stage in stages if stage["pipeline_rank"] == rank]) for rank in ranks}
    label = max(len(str(rank)) for rank in ranks)
    left = _WIDEST if room is None else min(_WIDEST, room - label - 4 - max(map(len, told.values())))
    if left < min(_NARROWEST, len(places)):
        return [f"{rank:>{label}}  {told[rank]}" for rank in ranks]
    each = -(-len(places) // left)
    full, empty = sign("\N{FULL BLOCK}", "#"), sign("\N{MIDDLE DOT}", ".")
    lines = []
    for rank in ranks:
        taken = {
            places[stack, layer] // each
            for stage in stages
            if stage["pipeline_rank"] == rank
            for stack, layers in stage["layers"].items()
            for layer in layers
        }
        cells = "".join(full if at in taken else empty for at in range(-(-len(places) // each)))
        lines.append(f"{rank:>{label}}  {cells}  {told[rank]}")
    return lines


def _places(stages: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    """Where each layer stands among all."""
    layers = {(stack, layer) for stage in stages for stack, inside in stage["layers"].items() for layer in inside}
    ordered = sorted(layers, key=lambda each: (_STACKS.index(each[0]), each[1]))
    return {layer: number for number, layer in enumerate(ordered)}


def _told(chunks: Sequence[Mapping[str, Any]]) -> str:
    """What one rank has: ``embedding, layers 0-3,16-19, output layer``."""
    layers = {stack: sorted(layer for chunk in chunks for layer in chunk["layers"].get(stack, ())) for stack in _STACKS}
    parts = [
        "embedding" if any(chunk["embedding"] for chunk in chunks) else "",
        *(_title(stack, inside) for stack, inside in layers.items() if inside),
        "output layer" if any(chunk["output"] for chunk in chunks) else "",
    ]
    return ", ".join(filter(None, parts)) or "nothing"


def _title(stack: str, layers: Sequence[int]) -> str:
    return f"{_TITLES[stack]}{'s' * (len(layers) > 1)} {numbers_told(layers).replace(',', ', ')}"
