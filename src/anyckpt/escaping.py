"""How text from files is shown: a checkpoint may come from anybody, so a name can hold terminal escapes or HTML."""

from __future__ import annotations


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
