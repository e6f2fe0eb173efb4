"""A page in one file that asks for nothing else, and that no text from a checkpoint can make run anything.

Every text is escaped; besides, the page's policy of contents lets a browser run the page's own scripts alone, known by
their digests, and ask no server for anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.markup import text


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        ident: what links point to.
        title: its heading.
        html: its contents, escaped where they must be.
    """

    ident: str
    title: str
    html: str


@dataclass(frozen=True)
class Drawing:
    """A picture that a library's script draws.

    Attributes:
        ident: of the element that it is drawn in.
        item: what is drawn, as the library takes it.
    """

    ident: str
    item: dict[str, Any]


def page(
    title: str, lead: str, sections: Sequence[Section], drawings: Sequence[Drawing] = (), library: str = ""
) -> str:
    """The page.

    Args:
        title: its title.
        lead: HTML below the title.
        sections: its parts, in order.
        drawings: pictures in them.
        library: the script that draws these.
    """
    style, script = _resource("page.css"), _resource("page.js")
    scripts = [one for one in (library if drawings else "", script) if one]
    allowed = " ".join(f"'sha256-{_digest(one)}'" for one in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{one.ident}">{text(one.title)}</a></li>' for one in sections)
    parts = "".join(
        f'<section id="{one.ident}" aria-labelledby="{one.ident}-title">'
        f'<h2 id="{one.ident}-title">{text(one.title)}</h2>{one.html}</section>'
        for one in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{style}</style></head><body>"
        '<a class="skip" href="#main">To the contents</a>'
        f'<header><div><h1>{text(title)}</h1>{lead}</div><nav aria-label="Parts of this page"><ul>{links}</ul></nav>'
        f'</header><main id="main" tabindex="-1">{parts}</main>'
        f'<script type="application/json" id="drawings">{_plain(drawings)}</script>'
        f"{''.join(f'<script>{one}</script>' for one in scripts)}</body></html>\n"
    )


def _plain(drawings: Sequence[Drawing]) -> str:
    """Pictures as JSON that no HTML parser finds the end of a script in."""
    plain = json.dumps([one.item for one in drawings], separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
