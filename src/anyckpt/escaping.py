"""How text from files is shown: a checkpoint may come from anybody, so a name can hold terminal escapes or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """``text`` with control characters, lone surrogates and invisible formatting escaped: safe for a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_text(name: str) -> bool:
    """Whether a name is Unicode: a pickle's can have half of a surrogate pair, which no UTF-8 spells."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a notebook; every cell is escaped."""
    from html import escape

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align:left">{escape(c)}</{tag}>' for c in cells) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "".join(line(row, "td") for row in rows)
    return (
        f'<table><caption style="text-align:left"><b>{escape(caption)}</b></caption>{head}<tbody>{body}</tbody></table>'
    )
