"""What a shell completes: paths, and names that anyckpt knows, each with what it is."""

from __future__ import annotations

from collections.abc import Iterable

from click import Context, Parameter
from click.shell_completion import CompletionItem


def paths(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders, which the shell finds itself."""
    return [CompletionItem(incomplete, type="file")]


def folders(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders, which the shell finds itself."""
    return [CompletionItem(incomplete, type="dir")]


def formats(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Formats that can be written."""
    from anyckpt.formats import registry

    known = registry.formats()
    return _beginning(((name, known[name].title) for name in known if known[name].plan is not None), incomplete)


def families(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Model families."""
    from anyckpt.models.families import known_families

    return _beginning(((name, family.title) for name, family in sorted(known_families().items())), incomplete)


def dialects(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Namings of weights."""
    from anyckpt.models.dialects.external import other_dialects
    from anyckpt.models.dialects.spellings import DIALECTS

    return _beginning(((name, "") for name in ("hf", *DIALECTS, *other_dialects())), incomplete)


def algorithms(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Algorithms of quantization."""
    from anyckpt.quantization.forms import ALGORITHMS

    return _beginning(((name, "") for name in ALGORITHMS), incomplete)


def forms(_: Context, __: Parameter, incomplete: str) -> list[CompletionItem]:
    """Forms of quantized weights."""
    from anyckpt.quantization.forms import FORMS

    return _beginning(((name, "") for name in FORMS), incomplete)


def _beginning(known: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=title or None) for name, title in known if name.startswith(incomplete)]
