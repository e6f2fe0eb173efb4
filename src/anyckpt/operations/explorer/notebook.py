"""What notebooks show of results: tables, by what pages are made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from anyckpt.markup import Cell, notebook, paragraphs, table
from anyckpt.operations.explorer.rows import row_of, together
from anyckpt.operations.explorer.summary import summary
from anyckpt.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from anyckpt.operations.convert import Conversion
    from anyckpt.operations.difference import Difference
    from anyckpt.operations.inspection import Inspection
    from anyckpt.operations.steps.looking import LookedAt
    from anyckpt.operations.verification import Verification

_MOST_ROWS = 100


def of_inspection(found: Inspection) -> str:
    """What is in a checkpoint, and the tensors that were asked for."""
    if found.part is not None:
        return _of_part(found.part)
    parts = [table("", (), summary(found)), paragraphs(found.warnings, "warning"), paragraphs(found.notes, "note")]
    if found.tensors:
        from anyckpt.operations.explorer.sections import tensor_rows

        rows = [row_of(one) for one in found.tensors]
        header, numbers, cells = tensor_rows(rows[:_MOST_ROWS])
        parts.append(table("tensors", header, cells, numbers=numbers))
        if len(rows) > _MOST_ROWS:
            rest = together("", rows[_MOST_ROWS:])
            parts.append(paragraphs([f"and {len(rows) - _MOST_ROWS:,} more of {format_bytes(rest.nbytes)}"]))
    return notebook(*parts)


def of_difference(found: Difference) -> str:
    """How two checkpoints differ."""
    if found.part is not None:
        return _of_part(found.part)
    from anyckpt.operations.explorer.changes import parts

    return notebook(*parts(found, _MOST_ROWS, explore=False))


def of_verification(found: Verification) -> str:
    """Whether a checkpoint is sound, and what was looked at."""
    if found.part is not None:
        return _of_part(found.part)
    verdict = "sound" if found.sound else f"not sound: {len(found.problems):,} problems"
    problems = [(one.where, one.problem) for one in found.problems[:_MOST_ROWS]]
    looked = [
        (
            name.replace("_", " "),
            {True: "yes", False: "no"}.get(value, f"{value:,}") if isinstance(value, bool) else f"{value}",
        )
        for name, value in asdict(found.checked).items()
        if value
    ]
    return notebook(
        paragraphs([f"{found.path}: {verdict} ({found.format})"]),
        table("what is wrong", ("where", "problem"), problems) if problems else "",
        paragraphs(found.warnings, "warning"),
        table("looked at", (), looked) if looked else "",
        paragraphs(found.unchecked, "not looked at"),
    )


def _of_part(part: LookedAt) -> str:
    """What one of several processes did, where another one has the answer."""
    lines = [
        ("share", part.share),
        ("read", f"{format_bytes(part.bytes_read)} in {format_seconds(part.seconds)}"),
        ("missing shares", ", ".join(part.missing_shares)),
    ]
    return notebook(table("", (), [line for line in lines if line[1]]))


def of_conversion(done: Conversion) -> str:
    """What a conversion did."""
    told = "would be written" if done.dry_run else "written"
    lines = [
        (told, done.output),
        ("format", done.format),
        ("tensors", f"{done.tensors:,}"),
        ("size", format_bytes(done.bytes_written)),
        ("time", "" if done.dry_run else format_seconds(done.seconds)),
        ("share", done.share or ""),
        ("casts", ", ".join(f"{cast}: {count:,}" for cast, count in done.casts.items())),
    ]
    left = list(done.ignored.items())
    files = [
        (one["path"] or done.output, Cell(format_bytes(one["bytes"])), f"{one['tensors']:,}") for one in done.files
    ]
    more = [
        f"{len(one) - _MOST_ROWS:,} more {what}"
        for one, what in ((left, "left out"), (files, "files"))
        if len(one) > _MOST_ROWS
    ]
    return notebook(
        table("", (), [line for line in lines if line[1]]),
        table("files", ("file", "size", "tensors"), files[:_MOST_ROWS], numbers=(1, 2)) if files else "",
        table("left out", ("name", "why"), left[:_MOST_ROWS]) if left else "",
        paragraphs(more),
        paragraphs(done.notes, "note"),
    )
