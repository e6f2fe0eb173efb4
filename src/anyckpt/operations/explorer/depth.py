"""The parts of a page that follow the layers: what lies where, statistics over depth, and what changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.markup import Cell, Row, paragraphs, table
from anyckpt.operations.explorer.drawing import Cells, Drawings, Line, Picture
from anyckpt.operations.explorer.names import Standing, short
from anyckpt.operations.explorer.page import Section
from anyckpt.operations.explorer.rows import Stack, Tensors
from anyckpt.operations.explorer.sections import file_rows, files_table, layer_sizes, number
from anyckpt.operations.steps.statistics import Magnitudes
from anyckpt.units import byte_unit, format_bytes

_MOST_STACKS = 4
_MOST_KINDS = 40
_MOST_HISTOGRAMS = 16
_MOST_CELLS = 30_000
_MOST_ODD = 200
_ONE = "all"


def layers(stacks: Sequence[Stack], drawings: Drawings) -> tuple[Section, list[Picture]]:
    """Bytes of each layer; nothing if there are none."""
    pictures, parts = [], []
    for stack in stacks[:_MOST_STACKS]:
        sizes = layer_sizes(stack)
        told = f"Bytes of each of the {len(stack.layers):,} layers of {stack.name}, by what they are for."
        picture = drawings.stacked(told, stack.layers, sizes, f"layer of {stack.name}")
        rows: list[Row] = [
            (str(layer), *(Cell(format_bytes(part[i]), part[i]) for part in sizes.values()))
            for i, layer in enumerate(stack.layers)
        ]
        listed = table("", ("layer", *sizes), rows, numbers=range(len(sizes) + 1), explore="layers")
        parts.append(f"{picture.html}<details><summary>Bytes of layers as a table</summary>{listed}</details>")
        pictures.append(picture)
    return Section("layers", "Layers", "".join(parts) + _more(len(stacks) - _MOST_STACKS, "stacks")), pictures


def places(
    tensors: Sequence[Tensors],
    told: Mapping[str, Standing],
    stacks: Sequence[Stack],
    ranks: Mapping[str, str],
    drawings: Drawings,
) -> tuple[Section, list[Picture]]:
    """Which files, and ranks, hold which layers."""
    files = file_rows(tensors, told)
    listed = files_table(files, ranks)
    picture = _map_of_files(files, ranks, [stack.name for stack in stacks[:_MOST_STACKS]], drawings)
    undrawn = "The files hold too many layers for a picture; the table tells what is in each."
    without = paragraphs([undrawn][: picture is None and len(files) > 1 and bool(stacks)])
    html = (without if picture is None else picture.html) + listed
    return Section("places", "What lies where", html), [] if picture is None else [picture]


def statistics(
    tensors: Sequence[Tensors], stacks: Sequence[Stack], drawings: Drawings
) -> tuple[Section, list[Picture]]:
    """What the numbers are like over the layers, and what is odd about them."""
    parts, pictures = [_odd(tensors)], []
    for make in (_lines, _peaks, _histograms):
        picture = make(stacks[:_MOST_STACKS], drawings)
        if picture is not None:
            parts.append(picture.html)
            pictures.append(picture)
    parts.append("<p>The table of tensors has the numbers of each.</p>")
    return Section("statistics", "Statistics", "".join(parts)), pictures


def heat_of_stacks(
    stacks: Sequence[tuple[str, Mapping[str, Mapping[int, tuple[float, str]]]]],
    drawings: Drawings,
    told: str,
    colour: str,
) -> Picture | None:
    """Layers by kinds of tensors, coloured by a number on a logarithmic scale; what is zero is not drawn.

    Args:
        stacks: name, and kind -> layer -> number and what it is, in words.
        drawings: makes it.
        told: what it shows.
        colour: what the number is.
    """
    rows: dict[int, str] = {}
    made = []
    for stack, kinds in stacks:
        cells: list[tuple[int, int, float, str]] = []
        start = len(rows)
        for i, (kind, numbers) in enumerate(list(kinds.items())[:_MOST_KINDS]):
            rows[start + i] = short(kind)
            cells += [
                (layer, start + i, value, f"{stack}.{layer} {short(kind)}: {words}")
                for layer, (value, words) in numbers.items()
                if value != 0
            ]
        if cells:
            x, y, values, words = zip(*cells, strict=True)
            made.append(Cells((), x, y, values, words))
    if not made:
        return None
    told += _left_out(max(len(kinds) for _, kinds in stacks) - _MOST_KINDS, "kinds of tensors")
    return drawings.heat_map(told, made, across="layer", rows=rows, logarithmic=True, colour=colour)


def _map_of_files(
    files: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, str], stacks: Sequence[str], drawings: Drawings
) -> Picture | None:
    if len(files) < 2 or not stacks:
        return None
    names = {i: ranks.get(name) or name for i, name in enumerate(files)}
    unit, unit_name = byte_unit(
        max(size for facts in files.values() for part in facts["layers"].values() for size in part.values())
    )
    made: list[Cells] = []
    for stack in stacks:
        cells = [
            (layer, i, nbytes / unit, f"{names[i]}: {format_bytes(nbytes)} of layer {layer}")
            for i, facts in enumerate(files.values())
            for layer, nbytes in facts["layers"].get(stack, {}).items()
        ]
        if not cells or sum(len(one.x) for one in made) + len(cells) > _MOST_CELLS:
            continue
        x, y, values, words = zip(*cells, strict=True)
        made.append(Cells((stack,), x, y, values, words))
    if not made:
        return None
    choices = {"Stack": [one.choice[0] for one in made]} if len(made) > 1 else {}
    if not choices:
        made = [Cells((), one.x, one.y, one.values, one.told) for one in made]
    what = "ranks" if ranks else "files"
    told = f"Which of {len(files):,} {what}, from top to bottom, hold what of which layer; brighter is more bytes."
    return drawings.heat_map(told, made, across="layer", rows=names, choices=choices, colour=unit_name)


_CURVES: dict[str, Callable[[Tensors], float | None]] = {
    "standard deviation": lambda one: None if one.statistics is None else one.statistics.std,
    "largest magnitude": lambda one: one.largest,
    "mean": lambda one: None if one.statistics is None else one.statistics.mean,
    "largest magnitude / standard deviation": lambda one: one.peak,
    "share of zeros": lambda one: None if one.statistics is None else one.statistics.zeros / max(1, one.elements),
}


def _lines(stacks: Sequence[Stack], drawings: Drawings) -> Picture | None:
    made = []
    for what, curve in _CURVES.items():
        for stack in stacks:
            for kind, cells in list(stack.cells.items())[:_MOST_KINDS]:
                points = [(layer, curve(cells[layer])) for layer in stack.layers if layer in cells]
                found = [(layer, value) for layer, value in points if value is not None and math.isfinite(value)]
                if found:
                    x, y = zip(*found, strict=True)
                    made.append(Line((stack.name, what), short(kind), x, y))
    if not made:
        return None
    told = "Each kind of tensor over the layers. Choose what is drawn; the names below switch lines on and off."
    told += _left_out(max(len(stack.cells) for stack in stacks) - _MOST_KINDS, "kinds of tensors")
    names = list(dict.fromkeys(line.choice[0] for line in made))
    return drawings.lines(told, made, choices={"Stack": names, "Drawn": list(_CURVES)})


def _peaks(stacks: Sequence[Stack], drawings: Drawings) -> Picture | None:
    found = [
        (
            stack.name,
            {
                kind: {
                    layer: (one.peak, f"largest magnitude {one.largest:.4g}, {one.peak:.1f} standard deviations")
                    for layer, one in cells.items()
                    if one.peak is not None and one.largest is not None
                }
                for kind, cells in stack.cells.items()
            },
        )
        for stack in stacks
    ]
    told = "Outliers: how many standard deviations the largest element of each tensor is; brighter is farther out."
    return heat_of_stacks(found, drawings, told, "largest magnitude / standard deviation")


def _histograms(stacks: Sequence[Stack], drawings: Drawings) -> Picture | None:
    found: list[tuple[str, dict[int, tuple[Magnitudes, int]]]] = []
    left_out = 0
    for stack in stacks:
        for kind, cells in sorted(stack.cells.items(), key=lambda item: -sum(one.nbytes for one in item[1].values())):
            columns = {
                layer: (one.magnitudes, one.elements) for layer, one in cells.items() if one.magnitudes is not None
            }
            if columns and len(found) < _MOST_HISTOGRAMS:
                found.append((kind, columns))
            elif columns:
                left_out += 1
    if not found:
        return None
    told = (
        "How many elements are of which magnitude, by powers of two, in each layer: "
        "a layer that differs from its neighbours stands out."
    ) + _left_out(left_out, "smaller kinds of tensors")
    return drawings.histograms(told, found)


def _odd(tensors: Sequence[Tensors]) -> str:
    """A table of tensors that people want to know of: with NaN or infinite elements, of zeros, or all alike."""
    rows = []
    for one in tensors:
        found = one.statistics
        if found is None:
            continue
        reasons = [f"{found.nan:,} NaN"] * bool(found.nan) + [f"{found.inf:,} infinite"] * bool(found.inf)
        if one.elements and found.zeros == one.elements:
            reasons.append("all zeros")
        elif one.elements > 1 and found.min == found.max and found.min is not None:
            reasons.append(f"all {found.min:.4g}")
        if reasons:
            rows.append((one.name, ", ".join(reasons), number(one.largest)))
    if not rows:
        return paragraphs(["No tensor has elements that are NaN or infinite, and none has one number only."])
    listed = table(
        "tensors with NaN or infinite elements, or with one number only",
        ("tensor", "what", "largest magnitude"),
        rows[:_MOST_ODD],
        numbers=(2,),
        explore="tensors",
    )
    return f'<div class="names">{listed}</div>{_more(len(rows) - _MOST_ODD, "such tensors")}'


def _left_out(count: int, what: str) -> str:
    return f" {count:,} more {what} are not drawn." if count > 0 else ""


def _more(count: int, what: str) -> str:
    return paragraphs([f"{count:,} more {what} are not shown."] if count > 0 else [])
