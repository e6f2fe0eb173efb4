"""HTML of what is found in checkpoints: for notebooks, and parts of pages; every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple, TypeAlias

from anyckpt.escaping import printable

_NOTEBOOK_STYLE = """<style>.anyckpt{font:13px/1.4 system-ui,sans-serif;max-width:70em}
.anyckpt table{border-collapse:collapse;margin:.4em 0 1em}.anyckpt caption{font-weight:600;text-align:left}
.anyckpt td,.anyckpt th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
.anyckpt tbody th{font-weight:400}
.anyckpt .number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.anyckpt [style]{background:linear-gradient(#1f77b433,#1f77b433) no-repeat 0 0/var(--share) 100%}</style>"""


class Cell(NamedTuple):
    """What stands in a table's cell.

    Attributes:
        text: for people.
        key: the number that it is sorted by, if that is not its text.
        share: how much of a bar is filled, from 0 to 1; no bar if None.
    """

    text: str
    key: float | None = None
    share: float | None = None


Row: TypeAlias = Sequence["str | Cell"]


def text(value: object) -> str:
    """``value`` as the contents of an element or of a quoted attribute, with control characters made visible."""
    return escape(printable(str(value)))


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Row],
    *,
    numbers: Sequence[int] = (),
    explore: str | None = None,
) -> str:
    """A table.

    Args:
        caption: what it is.
        header: the columns' names; none for a list of facts.
        rows: cells, of which the first says what the row is of.
        numbers: columns of numbers, which are aligned and sorted as such.
        explore: what its rows are, as a plural, for a page whose script lets people search and sort it; or None.
    """
    head = "".join(f'<th scope="col"{_right(i, numbers)}>{text(name)}</th>' for i, name in enumerate(header))
    body = "".join(f"<tr>{_cells(row, numbers)}</tr>" for row in rows)
    kind = "" if explore is None else f' data-explore="{text(explore)}"'
    return (
        f"<table{kind}>{f'<caption>{text(caption)}</caption>' if caption else ''}"
        f"{f'<thead><tr>{head}</tr></thead>' if header else ''}<tbody>{body}</tbody></table>"
    )


def notebook(*parts: str) -> str:
    """Parts of HTML as a notebook shows them: with a style that reaches nothing else."""
    return f'{_NOTEBOOK_STYLE}<div class="anyckpt">{"".join(parts)}</div>'


def paragraphs(texts: Iterable[str], kind: str = "") -> str:
    """Sentences, one below another.

    Args:
        texts: of each.
        kind: a word before each, such as ``warning``.
    """
    told = f"<strong>{text(kind)}:</strong> " if kind else ""
    named = f' class="{text(kind)}"' if kind else ""
    return "".join(f"<p{named}>{told}{text(one)}</p>" for one in texts)


def _right(column: int, numbers: Sequence[int]) -> str:
    return ' class="number"' if column in numbers else ""


def _cells(row: Row, numbers: Sequence[int]) -> str:
    return "".join(_cell(Cell(one) if isinstance(one, str) else one, i, numbers) for i, one in enumerate(row))


def _cell(cell: Cell, column: int, numbers: Sequence[int]) -> str:
    tag, scope = ("td", "") if column else ("th", ' scope="row"')
    key = "" if cell.key is None else f' data-key="{cell.key:.12g}"'
    share = "" if cell.share is None else f' style="--share:{100 * cell.share:.1f}%"'
    return f"<{tag}{scope}{_right(column, numbers)}{key}{share}>{text(cell.text)}</{tag}>"
