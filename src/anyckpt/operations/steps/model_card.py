"""The card of a model on the Hub, from what is known: what it was made of, by what, and what its files are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from anyckpt import __version__
from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import Plan
from anyckpt.errors import few
from anyckpt.formats import registry
from anyckpt.storage.hub.paths import HubPath
from anyckpt.storage.hub.place import HubPlace

_LISTED = 200


def card_of(
    plan: Plan, sources: Sequence[Checkpoint], *, quantized: str | None = None
) -> Callable[[Mapping[str, tuple[int, str]]], str]:
    """What makes the card when the digests of the files are known.

    Nothing is said that is not known: no license, and no base model unless one was read from the Hub.  Where sources
    lie on disks is left out.

    Args:
        plan: of what is written.
        sources: what it is made of.
        quantized: the algorithm that its weights were quantized by.
    """

    def card(files: Mapping[str, tuple[int, str]]) -> str:
        return "\n".join(
            (*_front(plan, sources, quantized), "", *_text(plan, sources, quantized), "", *_table(files), "")
        )

    return card


def _front(plan: Plan, sources: Sequence[Checkpoint], quantized: str | None) -> list[str]:
    """Metadata that the Hub reads: YAML, whose strings may be written as JSON's."""
    bases = list(dict.fromkeys(named.repository for source in sources if (named := _on_hub(source)) is not None))
    lines = ["---"]
    library = registry.by_name(plan.format).library
    if library is not None:
        lines.append(f"library_name: {library}")
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in bases)]
    if bases and quantized is not None:
        lines.append("base_model_relation: quantized")
    return [*lines, "tags:", "- anyckpt", "---"]


def _text(plan: Plan, sources: Sequence[Checkpoint], quantized: str | None) -> list[str]:
    title = registry.by_name(plan.format).title
    lines = [f"A checkpoint ({title}) written by anyckpt {__version__}, made of:", ""]
    lines += [f"- {_named(source)}" for source in sources]
    if quantized is not None:
        lines += ["", f"Weights of its linear modules are quantized: {quantized}."]
    if plan.casts:
        lines += ["", f"Types were changed: {few(f'{count:,} tensors {cast}' for cast, count in plan.casts.items())}."]
    return lines


def _named(source: Checkpoint) -> str:
    title = registry.by_name(source.format).title if source.format in registry.formats() else source.format
    named = _on_hub(source)
    if named is None:
        return title
    assert isinstance(source.place, HubPlace)
    return f"`{named.repository}` at commit `{source.place.repository.commit}` ({title})"


def _on_hub(source: Checkpoint) -> HubPath | None:
    """The model's repository that a source was read from."""
    if not isinstance(source.place, HubPlace) or source.place.repository.path.kind != "model":
        return None
    return source.place.repository.path


def _table(files: Mapping[str, tuple[int, str]]) -> list[str]:
    rows = [f"| `{name}` | {nbytes:,} | `{sha256}` |" for name, (nbytes, sha256) in files.items()]
    left = len(rows) - _LISTED
    more = [] if left <= 0 else ["", f"And {left:,} more files, which `anyckpt verify` checks, too."]
    return ["| file | bytes | SHA-256 |", "|---|---|---|", *rows[:_LISTED], *more]
