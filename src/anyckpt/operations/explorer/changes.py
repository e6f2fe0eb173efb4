"""How two checkpoints differ, for pages and notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from anyckpt.markup import Cell, Row, paragraphs, table
from anyckpt.operations.difference import Difference
from anyckpt.operations.explorer.depth import heat_of_stacks
from anyckpt.operations.explorer.drawing import Drawings, Picture
from anyckpt.operations.explorer.names import standings
from anyckpt.operations.explorer.page import Section
from anyckpt.operations.explorer.sections import number
from anyckpt.operations.steps.movement import Movement

_MOST_ROWS = 1500


def changes(found: Difference, other: str, drawings: Drawings) -> tuple[Section, list[Picture]]:
    """The part of a page about how far a checkpoint is from another.

    Args:
        found: of both, with statistics.
        other: what the other is called.
        drawings: makes its picture.
    """
    stacks: dict[str, dict[str, dict[int, tuple[float, str]]]] = {}
    movements = found.movements or ()
    told = standings(one.name for one in movements)
    together: dict[tuple[str, str, int], list[Movement]] = {}
    for one in movements:
        where = told[one.name]
        if where.layer is not None:
            together.setdefault((where.stack, where.kind, where.layer), []).append(one)
    for (stack, kind, layer), several in together.items():
        largest = max(several, key=lambda one: math.inf if math.isnan(one.relative) else one.relative)
        words = f"{largest.relative:.4g}" + (f", the largest of {len(several):,}" if len(several) > 1 else "")
        stacks.setdefault(stack, {}).setdefault(kind, {})[layer] = (largest.relative, words)
    picture = heat_of_stacks(
        list(stacks.items()),
        drawings,
        f"How far each tensor is from that of {other}: the norm of the difference over its own norm. "
        "Brighter moved farther; what did not move is not drawn, and NaN is red.",
        "relative change",
    )
    drawn = "" if picture is None else picture.html
    html = f'{drawn}<div class="names">{"".join(parts(found, _MOST_ROWS, explore=True))}</div>'
    return Section("changes", "Changes", html), [] if picture is None else [picture]


def parts(found: Difference, most: int, *, explore: bool) -> list[str]:
    """A verdict and tables.

    Args:
        found: of two checkpoints.
        most: rows of each table.
        explore: for a page whose script lets people search and sort them.
    """
    same = found.compared - len(found.different)
    verdict = "Equal" if found.equal else "Different"
    made = [
        paragraphs([f"{verdict}: {same:,} of {found.compared:,} tensors are the same, by their {found.names} names."])
    ]
    kinds = ("tensors", "settings") if explore else (None, None)
    moved = [] if found.movements is None else found.most_moved(sort="relative")
    if moved:
        header = ("tensor", "relative change", "cosine", "largest", "mean", "elements that differ")
        rows: list[Row] = [
            (
                one.name,
                number(one.relative),
                "" if one.cosine is None else f"{one.cosine:.6f}",
                number(one.max_abs),
                number(one.mean_abs),
                Cell(f"{one.differing:,}", one.differing, one.differing / max(1, one.elements)),
            )
            for one in moved[:most]
        ]
        made.append(
            table("tensors that moved, the farthest first", header, rows, numbers=range(1, 6), explore=kinds[0])
        )
    told = {one.name for one in moved}
    others = [one for one in found.different if one.name not in told or one.reason != "values"]
    if others:
        listed = [
            (one.name, one.reason, one.a, one.b, number(one.max_abs), number(one.max_rel)) for one in others[:most]
        ]
        header = ("tensor", "differs in", "a", "b", "largest", "largest relative")
        made.append(table("tensors that differ", header, listed, numbers=(4, 5), explore=kinds[0]))
    for side, names in (("the first", found.only_in_a), ("the second", found.only_in_b)):
        if names:
            made.append(table("", (f"only in {side}",), [(name,) for name in names[:most]], explore=kinds[0]))
    for what, settings in (("configuration", found.configuration), ("state", found.state), ("file", found.files)):
        if settings:
            lines = [(one.name, one.a or "not said", one.b or "not said") for one in settings[:most]]
            made.append(table("", (what, "first", "second"), lines, explore=kinds[1]))
    left = _left((moved, others, found.only_in_a, found.only_in_b, found.configuration, found.state, found.files), most)
    made.append(paragraphs([*([f"{left:,} more are not listed."] if left else []), *found.notes]))
    made.append(paragraphs(found.not_compared, "not compared"))
    return made


def _left(lists: Sequence[Sequence[object]], most: int) -> int:
    return sum(max(0, len(one) - most) for one in lists)
