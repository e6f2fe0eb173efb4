"""Tables and lists of facts for people, fitted to the terminal; whole where output goes elsewhere.

A name is never cut or folded.  What does not fit beside it is left out, least important column first and with a word
about it, or moves below it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO

import click

from anyckpt.data_classes import dataclass
from anyckpt.escaping import printable

_GAP = "  "
_BELOW = "    "
_NARROWEST = 40
_NARROWEST_VALUE = 24
_SHORT_VALUE = 40
_SIZE = re.compile(r"(?<=[0-9]) (?=[kMGTPE]?B\b)")
_UNBREAKABLE = "\N{NO-BREAK SPACE}"
_FEW_TOO_LONG = 1 / 3


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its name.
        right: its cells are aligned to the right, as numbers are.
        optional: it may be left out where lines are too long: the larger, the sooner; 0 for never.
        part: neighbours of the same part stay on one line below a name, if they fit.
    """

    title: str
    right: bool = False
    optional: int = 0
    part: str = ""


@dataclass(frozen=True)
class Fitted:
    """A table as lines.

    Attributes:
        heading: the columns' names.
        body: the rows.
        left_out: numbers of the columns that are not there.
    """

    heading: list[str]
    body: list[str]
    left_out: tuple[int, ...] = ()


def width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream is; None if it is a file, a pipe or another program.

    Args:
        stream: standard output if None.
    """
    return max(get_terminal_size().columns, _NARROWEST) if (stream or sys.stdout).isatty() else None


def times() -> str:
    """The sign for "that many"."""
    return sign("\N{MULTIPLICATION SIGN}", "x")


def sign(wanted: str, plain: str) -> str:
    """A sign that is not ASCII, or one that is where the locale or the encoding has no other."""
    locale = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    try:
        wanted.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return plain
    return plain if locale in ("C", "POSIX") else wanted


def print_table(columns: Sequence[Column | str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """A table on standard output, for people.

    Args:
        columns: the first is that of names.
        rows: cells as text.
        title: a line above.
    """
    described = [Column(column) if isinstance(column, str) else column for column in columns]
    cells = [[printable(cell) for cell in row] for row in rows]
    table = fitted(described, cells, width())
    for line in [title, *table.heading] if title else table.heading:
        _put(line, bold=True)
    for line in table.body:
        print(line)
    if table.left_out:
        told = [_left_out(described[number].title, {row[number] for row in cells}) for number in table.left_out]
        for line in wrap_words(f"(no room for {', '.join(told)})", width() or _NARROWEST):
            print(line)


def _left_out(title: str, values: set[str]) -> str:
    """A column's name, and what it says if that is the same in all rows."""
    value = values.pop() if len(values) == 1 else ""
    return f"{title}: {value} in all rows" if value and len(value) <= _SHORT_VALUE else title


def print_tsv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for programs: a line of names, then one for each row, with tabs between; control characters escaped."""
    print("\t".join(columns))
    for row in rows:
        print("\t".join(printable("" if cell is None else str(cell)) for cell in row))


def print_facts(facts: Iterable[tuple[str, str]], *, title: str = "") -> None:
    """Names and values, one below the other; long values go on below themselves on a terminal."""
    listed = [(printable(name), printable(value)) for name, value in facts]
    room = width()
    if title:
        _put(title, bold=True)
    widest = max((len(name) for name, _ in listed), default=0)
    if room is not None:
        widest = min(widest, max(room - _NARROWEST_VALUE, room // 2))
    indent = " " * (widest + len(_GAP))
    for name, value in listed:
        lines = [value] if room is None else wrap_words(value, room - len(indent)) or [""]
        if len(name) > widest:
            lines = ["", *lines]
        _put((name.ljust(len(indent)) + lines[0]).rstrip(), cyan=len(name))
        for line in lines[1:]:
            print(indent + line)


def wrap_words(text: str, room: int, indent: str = "") -> list[str]:
    """Printable text in lines of at most so many characters; words are never cut, nor sizes from their units.

    Args:
        text: what to wrap.
        room: characters in a line.
        indent: before all lines but the first.
    """
    together = _SIZE.sub(_UNBREAKABLE, text)
    lines = wrap(together, max(room, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_UNBREAKABLE, " ") for line in lines]


def fitted(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int | None) -> Fitted:
    """A table's lines.

    Args:
        columns: the first is that of names.
        cells: rows of text.
        room: characters in a line, or None for as many as are needed.
    """
    expendable = sorted((i for i, column in enumerate(columns) if column.optional), key=lambda i: -columns[i].optional)
    for count in range(len(expendable) + 1):
        left_out = sorted(expendable[:count])
        kept = [number for number in range(len(columns)) if number not in left_out]
        lines = _beside([columns[i] for i in kept], [[row[i] for i in kept] for row in cells], room)
        if lines:
            return Fitted(lines[:1], lines[1:], tuple(left_out))
    return _stacked(columns, cells, room or 0, expendable)


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max([len(column.title), *(len(row[number]) for row in cells)]) for number, column in enumerate(columns)]


def _aligned(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    placed = zip(columns, row, widths, strict=True)
    return _GAP.join(cell.rjust(size) if column.right else cell.ljust(size) for column, cell, size in placed)


def _beside(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int | None) -> list[str]:
    """Names with all else beside them, below the few that are too long; nothing if too many are."""
    titles = [column.title for column in columns]
    widths = _widths(columns, cells)
    rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    if room is not None and widths[0] + rest > room:
        left = room - rest
        too_long = sum(len(row[0]) > left for row in cells)
        if left < len(titles[0]) or too_long > len(cells) * _FEW_TOO_LONG:
            return []
        widths[0] = max([len(titles[0]), *(len(row[0]) for row in cells if len(row[0]) <= left)])
    lines = [_aligned(columns, titles, widths).rstrip()]
    for row in cells:
        if len(row[0]) > widths[0]:
            lines.append(row[0])
            row = ["", *row[1:]]
        lines.append(_aligned(columns, row, widths).rstrip())
    return lines


def _stacked(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int, expendable: Sequence[int]) -> Fitted:
    """Each name on a line of its own, all else below it in as few lines as it takes without what is expendable."""
    widths = _widths(columns, cells)
    ways = [tuple(sorted(expendable[:count])) for count in range(len(expendable) + 1)]
    left_out = min(ways, key=lambda way: (len(_lines_of_columns(columns, widths, room, way)), len(way)))
    below = _lines_of_columns(columns, widths, room, left_out)

    def lines(row: Sequence[str]) -> list[str]:
        placed = [([columns[i] for i in group], [row[i] for i in group], [widths[i] for i in group]) for group in below]
        return [row[0], *(line for parts in placed if (line := _BELOW + _aligned(*parts).rstrip()).strip())]

    heading = lines([column.title for column in columns])
    return Fitted(heading, [line for row in cells for line in lines(row)], left_out)


def _lines_of_columns(
    columns: Sequence[Column], widths: Sequence[int], room: int, left_out: Sequence[int]
) -> list[list[int]]:
    """Numbers of the columns that share a line below a name."""
    kept = [number for number in range(1, len(columns)) if number not in left_out]
    parts = [list(numbers) for _, numbers in groupby(kept, lambda number: columns[number].part)]
    lines: list[list[int]] = []

    def taken(numbers: Sequence[int]) -> int:
        return len(_BELOW) + sum(widths[number] for number in numbers) + len(_GAP) * (len(numbers) - 1)

    for part in parts:
        for numbers in [part] if taken(part) <= room else [[number] for number in part]:
            if lines and taken([*lines[-1], *numbers]) <= room:
                lines[-1] += numbers
            else:
                lines.append(numbers)
    return lines


def print_heading(text: str) -> None:
    """A line that stands above others."""
    _put(printable(text), bold=True)


def _put(text: str, *, bold: bool = False, cyan: int = 0) -> None:
    """A line, on a terminal in bold or with its first characters in cyan, unless colours are not wanted."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        print(text)
    else:
        head, rest = text[:cyan], text[cyan:]
        click.echo((click.style(head, fg="cyan") if cyan else "") + (click.style(rest, bold=True) if bold else rest))
